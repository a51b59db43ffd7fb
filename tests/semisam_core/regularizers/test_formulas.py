"""Each regularizer against its published formula in plain arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from semisam_core.losses import confidence_aware_loss, supervised_loss
from semisam_core.regularizers import Regularizer
from semisam_core.regularizers.adversarial import Discriminator
from semisam_core.regularizers.copy_paste import box_mask
from semisam_core.regularizers.fixmatch import strong_view
from semisam_core.regularizers.interpolation import draw_share
from semisam_core.regularizers.uncertainty_aware import threshold
from tests.semisam_core.regularizers.steps import (
    SIDES,
    Fixed,
    built,
    flat_gradient,
    noise,
    specialist,
    step_of,
    student_loss,
)


def _softmax(logits: Tensor) -> Tensor:
    exponential = (logits - logits.amax(1, keepdim=True)).exp()
    return exponential / exponential.sum(1, keepdim=True)


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * (probability + 1e-30).log()).sum(1)


def _noisy(image: Tensor, generator: torch.Generator) -> Tensor:
    return image + (0.1 * torch.randn(image.shape, generator=generator)).clamp(-0.2, 0.2)


def test_mean_teacher_is_the_mean_squared_difference_to_the_teacher_on_a_noisy_copy() -> None:
    student, teacher = specialist(0), specialist(1)
    loss = student_loss("mean-teacher", step_of(student, teacher, seed=4))
    image = step_of(student).unlabeled.image
    answer = _softmax(teacher(_noisy(image, torch.Generator().manual_seed(4))))
    expected = ((_softmax(student(image)) - answer) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("t", [0, 9])
def test_uncertainty_aware_mean_teacher_counts_the_voxels_of_low_entropy(t: int) -> None:
    student, teacher = specialist(0), specialist(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.6)  # so that some voxels are certain and some are not
    loss = student_loss("ua-mt", step_of(student, teacher, t=t, seed=4))
    image, generator = step_of(student).unlabeled.image, torch.Generator().manual_seed(4)
    answer = _softmax(teacher(_noisy(image, generator)))
    mean = torch.stack([_softmax(teacher(_noisy(image, generator))) for _ in range(8)]).mean(0)
    limit = (0.75 + 0.25 * math.exp(-5 * (1 - t / 10) ** 2)) * math.log(2)
    certain = _entropy(mean) < limit
    assert 0 < int(certain.sum()) < certain.numel()
    squared = (_softmax(student(image)) - answer) ** 2
    expected = sum(squared[:, channel][certain].sum() for channel in range(2)) / (2 * certain.sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def _sure(strength: float = 20.0) -> Fixed:
    """Return a network that is certain of a random class at every voxel."""
    sign = noise(1, *SIDES, seed=3).sign()
    return Fixed(strength * torch.cat([sign, -sign]))


def _half_certain(strength: float = 20.0) -> Fixed:
    """Return a teacher that is certain of background in the first half of the rows and guesses in the second."""
    logits = torch.zeros(2, *SIDES)
    logits[0, : SIDES[0] // 2] = strength
    return Fixed(logits)


def test_voxels_where_the_teacher_guesses_have_no_gradient() -> None:
    student = Fixed(noise(2, *SIDES))
    student_loss("ua-mt", step_of(student, _half_certain(), labeled=False)).backward()
    assert student.logits.grad is not None
    certain, uncertain = student.logits.grad[:, : SIDES[0] // 2], student.logits.grad[:, SIDES[0] // 2 :]
    assert bool((certain != 0).all())
    assert bool((uncertain == 0).all())


def test_a_teacher_that_guesses_everywhere_gives_no_loss_and_no_gradient() -> None:
    student = Fixed(noise(2, *SIDES))
    loss = student_loss("ua-mt", step_of(student, _half_certain(strength=0.0), labeled=False))
    loss.backward()
    assert loss.item() == 0.0
    assert float(flat_gradient(student).norm()) == 0.0


def test_with_a_teacher_that_is_certain_everywhere_ua_mt_equals_mean_teacher() -> None:
    student, teacher = Fixed(noise(2, *SIDES)), _sure()
    aware, plain = (student_loss(name, step_of(student, teacher)) for name in ("ua-mt", "mean-teacher"))
    assert aware.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_the_threshold_rises_to_the_entropy_of_a_uniform_guess(channels: int) -> None:
    limits = [threshold(t, 100, channels) for t in range(101)]
    assert limits == sorted(limits)
    assert limits[0] == pytest.approx((0.75 + 0.25 * math.exp(-5)) * math.log(channels))
    assert limits[-1] == pytest.approx(math.log(channels))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), channels=st.integers(2, 4), sharpness=st.floats(0.1, 30))
def test_entropy_is_shannon_entropy_over_its_maximum(seed: int, channels: int, sharpness: float) -> None:
    student = Fixed(sharpness * noise(channels, 3, 2, 2, seed=seed))
    logits = student.logits.detach()
    total = 0.0
    for voxel in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2)).tolist():
        odds = [math.exp(float(logits[(channel, *voxel)])) for channel in range(channels)]
        total -= sum(o / sum(odds) * math.log(o / sum(odds)) for o in odds if o > 0)
    expected = total / 12 / math.log(channels)
    loss = student_loss("entropy-minimisation", step_of(student, labeled=False)).item()
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert -1e-6 <= loss <= 1 + 1e-6


def test_entropy_is_one_for_a_guess_and_zero_with_finite_gradient_for_certainty() -> None:
    guess, certain = Fixed(torch.zeros(2, *SIDES)), _sure(strength=400.0)
    assert student_loss("entropy-minimisation", step_of(guess, labeled=False)).item() == pytest.approx(1.0)
    loss = student_loss("entropy-minimisation", step_of(certain, labeled=False))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert bool(flat_gradient(certain).isfinite().all())


def test_entropy_minimisation_sharpens_any_prediction() -> None:
    student = Fixed(torch.stack([torch.full(SIDES, 0.3), torch.full(SIDES, -0.3)]))
    student_loss("entropy-minimisation", step_of(student, labeled=False)).backward()
    assert student.logits.grad is not None
    assert bool((student.logits.grad[0] < 0).all())
    assert bool((student.logits.grad[1] > 0).all())


def _set_share(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr("semisam_core.regularizers.interpolation.draw_share", lambda _: share)


@pytest.mark.parametrize("count", [2, 3])
def test_interpolation_compares_the_prediction_of_the_mix_with_the_mix_of_predictions(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    _set_share(monkeypatch, 0.3)
    student, teacher = specialist(0), specialist(1)
    step = step_of(student, teacher, count=count)
    loss = student_loss("ict", step)
    errors = []
    for k in range(count):
        first, second = step.unlabeled.image[k : k + 1], step.unlabeled.image[(k + 1) % count].unsqueeze(0)
        answer = 0.3 * _softmax(teacher(first)) + 0.7 * _softmax(teacher(second))
        errors.append(((_softmax(student(0.3 * first + 0.7 * second)) - answer) ** 2).mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_mixing_interpolation_is_mean_teacher_without_noise(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    _set_share(monkeypatch, share)
    student, teacher = specialist(0), specialist(1)
    step = step_of(student, teacher)
    expected = ((_softmax(student(step.unlabeled.image)) - _softmax(teacher(step.unlabeled.image))) ** 2).mean()
    assert student_loss("ict", step).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_linear_network_has_no_interpolation_loss() -> None:
    class Linear(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            share = image.sigmoid() * 0 + 0.5 + 0.05 * image.clamp(-4, 4)  # a probability, linear in the scan
            return torch.cat([share, 1 - share], 1).log()

    assert student_loss("ict", step_of(Linear())).item() == pytest.approx(0.0, abs=1e-10)


def test_mixing_shares_follow_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([draw_share(generator) for _ in range(3000)])
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)


def _second(regularizer: Regularizer) -> nn.Module:
    assert regularizer.auxiliary is not None
    network = specialist()
    network.load_state_dict({k.removeprefix("second."): v for k, v in regularizer.auxiliary.state().items()})
    return network


def _cross_entropy(learner: Tensor, other: Tensor) -> Tensor:
    probability = _softmax(learner)
    chosen = torch.where(other[:, 1] > other[:, 0], probability[:, 1], probability[:, 0])
    return -chosen.log().mean()


def test_cross_pseudo_supervision_is_cross_entropy_with_the_other_networks_class_on_both_kinds_of_scan() -> None:
    regularizer, student = built("cps"), specialist(3)
    step = step_of(student)
    losses, second = regularizer.losses(step), _second(regularizer)
    assert losses.student is not None
    assert losses.auxiliary is not None
    assert step.labeled is not None
    scans = (step.unlabeled.image, step.labeled.image)
    expected = sum(_cross_entropy(student(scan), second(scan)) for scan in scans)
    assert losses.student.item() == pytest.approx(expected.item(), rel=1e-5)
    cross = sum(_cross_entropy(second(scan), student(scan)) for scan in scans)
    supervised = supervised_loss(second(step.labeled.image), step.labeled.label)
    assert losses.auxiliary.item() == pytest.approx((supervised + 0.1 * cross).item(), rel=1e-5)


def test_cross_pseudo_supervision_is_symmetric() -> None:
    regularizer, student = built("cps"), specialist(3)
    second = _second(regularizer)
    losses = regularizer.losses(step_of(student, labeled=False))
    assert regularizer.auxiliary is not None
    regularizer.auxiliary.load({f"second.{k}": v for k, v in student.state_dict().items()})
    exchanged = regularizer.losses(step_of(second, labeled=False))
    assert losses.student is not None
    assert losses.auxiliary is not None
    assert exchanged.student is not None
    assert exchanged.auxiliary is not None
    assert losses.auxiliary.item() == pytest.approx(0.1 * exchanged.student.item(), rel=1e-5)
    assert exchanged.auxiliary.item() == pytest.approx(0.1 * losses.student.item(), rel=1e-5)


def test_the_second_network_learns_from_pseudo_labels_like_the_student() -> None:
    regularizer, student = built("cps"), specialist(3)
    step = step_of(student, labeled=False, pseudo_label=True)
    auxiliary, batch = regularizer.losses(step).auxiliary, step.unlabeled
    second = _second(regularizer)(batch.image)
    taught = confidence_aware_loss(_softmax(second)[:, 1:], batch.target, batch.uncertainty, batch.valid)
    expected = 0.7 * taught + 0.1 * _cross_entropy(second, student(batch.image))
    assert auxiliary is not None
    assert auxiliary.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_two_networks_start_with_different_weights() -> None:
    second = _second(built("cps")).state_dict()
    assert any(not torch.equal(value, second[name]) for name, value in specialist(0).state_dict().items())


def _discriminator(regularizer: Regularizer) -> Discriminator:
    assert regularizer.auxiliary is not None
    network = Discriminator(channels=3)
    network.load_state_dict({k.removeprefix("discriminator."): v for k, v in regularizer.auxiliary.state().items()})
    return network


def test_the_adversarial_losses_are_those_of_the_paper() -> None:
    regularizer, student = built("dan"), specialist(3)
    step = step_of(student)
    losses, score = regularizer.losses(step), _discriminator(regularizer)
    assert losses.student is not None
    assert losses.auxiliary is not None
    assert step.labeled is not None
    unlabeled = torch.sigmoid(score(step.unlabeled.image, _softmax(student(step.unlabeled.image))))
    labeled = torch.sigmoid(score(step.labeled.image, _softmax(student(step.labeled.image))))
    assert losses.student.item() == pytest.approx(-unlabeled.log().mean().item(), rel=1e-5)
    separated = -labeled.log().mean() - (1 - unlabeled).log().mean()
    assert losses.auxiliary.item() == pytest.approx(separated.item(), rel=1e-5)


def test_a_discriminator_that_learns_to_separate_scans_raises_the_students_loss() -> None:
    regularizer, student = built("dan"), specialist(3)
    assert regularizer.auxiliary is not None
    step = step_of(student)
    step.unlabeled.image.mul_(0.2)  # the unlabeled scans look fainter
    before = regularizer.losses(step)
    for t in range(150):
        loss = regularizer.losses(copy.copy(step)).auxiliary
        assert loss is not None
        regularizer.auxiliary.step(loss, t)
    after, score = regularizer.losses(step), _discriminator(regularizer)
    assert before.student is not None
    assert after.student is not None
    assert step.labeled is not None
    assert bool((score(step.labeled.image, _softmax(step.labeled.logits)) > 0).all())
    assert bool((score(step.unlabeled.image, _softmax(step.logits)) < 0).all())
    assert after.student.item() > before.student.item()


def test_without_labeled_scans_there_is_no_adversarial_term() -> None:
    losses = built("dan").losses(step_of(specialist(), labeled=False, pseudo_label=True))
    assert losses.student is None
    assert losses.auxiliary is None


@pytest.mark.parametrize("sides", [(8, 8, 8), (16, 12, 9), (33, 8, 20)])
def test_the_discriminator_accepts_patches_of_any_size(sides: tuple[int, int, int]) -> None:
    scores = Discriminator(channels=3)(noise(2, 1, *sides), noise(2, 2, *sides))
    assert scores.shape == (2,)


def test_fixmatch_is_cross_entropy_of_strong_views_where_the_teacher_is_certain() -> None:
    student, teacher = specialist(0), Fixed(2 * noise(2, *SIDES))
    loss = student_loss("fixmatch", step_of(student, teacher, seed=4))
    image, generator = step_of(student).unlabeled.image, torch.Generator().manual_seed(4)
    answer = _softmax(teacher(image))
    certain, chosen = answer.amax(1) >= 0.95, answer.argmax(1, keepdim=True)
    assert 0 < float(certain.float().mean()) < 1
    expected = []
    for _ in range(2):
        probability = _softmax(student(strong_view(image, generator))).gather(1, chosen)[:, 0]
        expected.append(float(-(probability.log() * certain).sum() / certain.numel()))
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_fixmatch_learns_nothing_from_a_teacher_that_guesses() -> None:
    student = specialist(0)
    loss = student_loss("fixmatch", step_of(student, Fixed(torch.zeros(2, *SIDES))))
    loss.backward()
    assert float(loss.detach()) == float(flat_gradient(student).abs().sum()) == 0


def test_a_strong_view_blanks_a_box_and_moves_no_voxel() -> None:
    image = torch.zeros(1, 1, 20, 20, 10)
    image[..., 5:15, 5:15, :] = 1
    view = strong_view(image, torch.Generator().manual_seed(0))
    values, counts = view.unique(return_counts=True)
    assert int(counts.max()) == 8 * 8 * 4  # all else is noisy
    outside = (view != values[counts.argmax()]).squeeze()
    inside, around = view[0, 0][outside & (image[0, 0] > 0)], view[0, 0][outside & (image[0, 0] == 0)]
    assert float(inside.mean() - around.mean()) > 0.3


def test_copy_paste_learns_each_part_of_a_mixture_from_its_own_label() -> None:
    student, teacher = specialist(0), specialist(1)
    step = step_of(student, teacher, seed=4)
    loss = student_loss("bcp", step)
    assert step.labeled is not None
    known, label, unknown = step.labeled.image, step.labeled.label, step.unlabeled.image
    answer = teacher(unknown).argmax(1)
    box = box_mask(known.shape[2:], torch.Generator().manual_seed(4))
    expected = 0.0
    for expert in (~box, box):
        mixed = known.clone()
        mixed[..., ~expert] = unknown[..., ~expert]
        logits = student(mixed)
        parts = [(label[:, expert], expert, 1.0), (answer[:, ~expert], ~expert, 0.5)]
        for truth, part, weight in parts:
            expected += weight * float(supervised_loss(logits[..., part][..., None, None], truth[..., None, None]))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-4)


def test_the_pasted_box_has_two_thirds_of_each_side_and_lies_anywhere_in_the_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([box_mask(torch.Size((9, 6, 3)), generator) for _ in range(100)])
    assert set(masks.flatten(1).sum(1).tolist()) == {6 * 4 * 2}
    assert bool(masks.any(0).all())
