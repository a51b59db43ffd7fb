"""A hospital's local work: join, train a round, evaluate. Independent of how messages travel."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from client.labeling import Labeler
from client.privacy import Cost, SitePrivacy
from client.progress import ProgressLog
from client.report import (
    Scalars,
    SiteReport,
    log_gates,
    log_scores,
    mean_scores,
    score_patients,
    training_patients,
    training_scalars,
)
from client.restore import RoundStart, local_layers
from client.scans import ScanPair, SiteScans
from client.secure import SecureRound
from client.site_config import SiteConfig
from client.state import RunState
from semisam_core.codecs import encode_update
from semisam_core.contract import PRIVATE_TRAIN_SCALARS, split_update, travelling, weights_sha256, with_prefix
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import keep_classes, load_original_label
from semisam_core.errors import SemiSAMError
from semisam_core.evaluation import ClassScore, score_case
from semisam_core.files import append_json_line, write_json
from semisam_core.inference import segment_original
from semisam_core.optimizers import moments
from semisam_core.plan import Plan
from semisam_core.privacy.randomness import SecureRandomness, SeededRandomness
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.pseudo_labels.store import StoredPseudoLabel
from semisam_core.regularizers import teaches
from semisam_core.reporting.overview import Panel, draw_overview
from semisam_core.secure_aggregation.weights import whole_weights
from semisam_core.sources.head_network import FeatureHead
from semisam_core.training import Loader, LocalRound, TrainingResult, train_round

logger = logging.getLogger(__name__)


class NoUsableCaseError(SemiSAMError):
    """Every case of the site is quarantined."""


class Site:
    """One site working on one round of one run of one plan.

    Args:
        config: the site's YAML.
        plan: the study plan, already accepted.
        run: the run's name.
        round_number: counts from 1; 0 while joining.

    Raises:
        ConfigError: folders or lists in the YAML are invalid, or the site has nothing to learn from.
        SplitChangedError: the split by patient is not the one that the run began with.
        ValueError: the run's name is malformed.
    """

    def __init__(self, config: SiteConfig, plan: Plan, run: str, round_number: int) -> None:
        self.config, self.plan, self.run, self.round = config, plan, run, round_number
        self.state = RunState(config.storage.folder, run)
        self.progress = ProgressLog(self.state.folder / "progress.jsonl", round_number)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = config.torch_device()
        self.scans = SiteScans(config, plan, self.progress, self.state.folder, round_number)
        self._start = RoundStart(plan, self.state, round_number, self.device)
        self._privacy = SitePrivacy(config, plan)

    def join(self) -> SiteReport:
        """Check and prepare every case, quarantine the bad ones, and report counts.

        Raises:
            NoUsableCaseError: nothing is left to train on or to score.
            WeightsError: a generalist's weights are missing or altered.
            PrivacyLimitError: the plan has less privacy than this site demands.
            PrivacyBudgetError: the patients have spent too much for another round.
            LedgerError: the privacy ledger cannot be trusted.
        """
        self.scans.check(again=True)
        quarantined = self.scans.quarantined
        write_json(self.state.folder / "quarantine.json", [{"case": q.id, "reason": q.reason} for q in quarantined])
        if not self.scans.usable(*Role):
            raise NoUsableCaseError(f"site {self.config.site}: all {len(quarantined)} cases are quarantined.")
        self._privacy.check_join(self.scans.identities() if self.plan.privacy is not None else ())
        return SiteReport(self.scans.counts() | {"generalists": len(self._labeler.generalists)})

    def train(self, weights: Mapping[str, Tensor]) -> SiteReport:
        """Refresh pseudo-labels on schedule, train one round, and store what stays here for the next.

        Under secure aggregation the update is kept for the round's sum instead of being returned.

        Stored are the teacher, the regularizer's own networks, and, as the plan says, the specialist's local layers,
        the optimizer's moments, what the codec left out, and the weights that the server may send a change of. A
        private round is booked in the site's ledger before its first step; what it sends is stored too, so that the
        same round asked for again sends the same and spends nothing.

        Args:
            weights: the tensors as the server sent them, the specialist's and the feature head's.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
            FloatingPointError: training diverged.
            UpdateTooLargeError: under secure aggregation, the update changed by more than the plan's bound.
            PrivacyLimitError: the plan has less privacy than this site demands.
            PrivacyBudgetError: the round would spend more than this site allows.
            LedgerError: the privacy ledger cannot be trusted.
        """
        self._forget_secrets()
        codec = self.plan.aggregation.codec
        if codec is not None and codec.downloads:
            self.state.save_received(self.round, dict(weights))
        if self.plan.privacy is None:
            self._privacy.check_limits()
            return self._handed_over(self._train(weights), weights)
        asked = hashlib.sha256(f"{self.plan.hash}|{weights_sha256(weights)}".encode()).hexdigest()
        if (kept := self.state.load_update(self.round, asked)) is not None:
            return self._handed_over(SiteReport(self._allowed(kept[1]), kept[0]), weights)
        report = self._train(weights)
        self.state.save_update(self.round, asked, report.weights or {}, report.scalars)
        return self._handed_over(replace(report, scalars=self._allowed(report.scalars)), weights)

    def _train(self, weights: Mapping[str, Tensor]) -> SiteReport:
        began = time.monotonic()
        own, head_weights = split_update(weights)
        specialist, head = self._start.specialist(own, self.round), self._start.head(head_weights)
        cost = self._booked()
        teacher = self._start.teacher(specialist)
        regularizer = self._start.regularizer()
        optimizer = self._start.optimizer(specialist)
        known = self._known()
        made = self._labeler.labels(self.round, teacher, self.scans.keyed_pair_loaders(Role.UNLABELED), known, head)
        labels = self.scans.taught_from(made)
        seed = derive_seed(self.plan.seed, self.config.site, self.round)
        head_steps = self._labeler.train_head(head, known, self.round, seed) if head is not None else 0
        labeled, unlabeled = self._loaders(labels) if self.plan.privacy is None else ([], [])
        local = LocalRound(
            plan=self.plan,
            specialist=specialist,
            teacher=teacher,
            labeled=labeled,
            unlabeled=unlabeled,
            number=self.plan.training.local_round(self.round),
            seed=seed,
            device=self.device,
            regularizer=regularizer,
            optimizer=optimizer,
            annotated=self.scans.annotated,
            progress=lambda done, total: self.progress("train", done, total, "steps"),
        )
        result = train_round(local) if self.plan.privacy is None else self._train_privately(local, labels)
        self.state.save_teacher(self.round, _cpu(teacher.state_dict()))
        if regularizer is not None and regularizer.auxiliary is not None:
            self.state.save_networks(self.round, regularizer.auxiliary.state())
        if self.plan.training.optimizer.state == "kept":
            self.state.save_moments(self.round, moments(optimizer, specialist, self.plan.training.optimizer))
        if self.plan.specialist.statistics == "local":
            self.state.save_layers(self.round, _cpu(local_layers(self.plan, specialist)))
        log_gates(self.state.folder / "gates.jsonl", self.round, labels, self.plan.class_names)
        scalars = training_scalars(self.scans.counts(), labels, result, time.monotonic() - began)
        sent = travelling(self.plan, specialist)
        if head is not None:
            scalars["head_steps"] = head_steps
            sent |= with_prefix(head)
        patients = self._patients(scalars, labels)
        return SiteReport(scalars if self.plan.privacy is None else self._noised(scalars, cost), _cpu(sent), patients)

    def _handed_over(self, report: SiteReport, reference: Mapping[str, Tensor]) -> SiteReport:
        """Return a round's report with the update as it leaves, coded if the plan says so.

        Under secure aggregation it leaves with the sum: it is kept until then.
        """
        update = report.weights or {}
        if self.plan.aggregation.codec is not None:
            coded, owed = encode_update(update, reference, self._start.owed(), self.plan)
            self.state.save_owed(self.round, owed)
            return replace(report, weights=coded)
        if self.secure is None:
            return report
        counts = whole_weights(report.scalars, self.plan, self.round)
        self.secure.keep(update, reference, counts)
        return replace(report, weights=None)

    def _booked(self) -> Cost | None:
        """Book the round, if it is private and there is anybody to train on, and return what it costs."""
        if self.plan.privacy is None or not self.scans.patients():
            return None
        return self._privacy.book(self.run, self.round, self.scans.identities())

    def _train_privately(self, local: LocalRound, labels: Mapping[str, StoredPseudoLabel]) -> TrainingResult:
        from semisam_core.privacy.training import Patient, train_private_round  # imports Opacus

        patients = []
        for patient, cases in sorted(self.scans.patients().items()):
            labeled, unlabeled = self._loaders(labels, cases)
            patients.append(Patient(patient, labeled, unlabeled))
        if self.config.privacy.noise == "secure":
            return train_private_round(local, patients, SecureRandomness())
        logger.warning("The noise of this round comes from a seed: it protects nobody. Set privacy.noise to secure.")
        seed = derive_seed(self.plan.seed, f"{self.config.site}|noise", self.round)
        return train_private_round(local, patients, SeededRandomness(seed))

    def _noised(self, scalars: Scalars, cost: Cost | None) -> Scalars:
        """Log all scalars of a private round here, and return those that are not computed from scans without noise."""
        everything = scalars if cost is None else scalars | cost.scalars()
        append_json_line(self.state.folder / "training.jsonl", {"round": self.round, **everything})
        return {name: value for name, value in everything.items() if name in PRIVATE_TRAIN_SCALARS}

    def _allowed(self, scalars: Scalars) -> Scalars:
        """Return the scalars of a private round that this site lets leave."""
        shown = self.config.egress.epsilon
        return {name: value for name, value in scalars.items() if shown or not name.startswith("epsilon.")}

    def _known(self) -> list[tuple[str, Callable[[], ScanPair | None]]]:
        """Return (case, loader) of the scans whose labels help with other patients' scans; none under privacy."""
        return self.scans.pair_loaders(Role.LABELED) if self.plan.privacy is None else []

    def evaluate(self, weights: Mapping[str, Tensor], final: bool) -> SiteReport:
        """Score the specialist on the classes that the validation labels mark, in each scan's own geometry.

        Local layers are as the site's last training left them. Per-case scores stay in the site's storage; means over
        cases are reported.

        Args:
            weights: the specialist to score, and the feature head, which is used for the picture only.
            final: whether to draw the site's picture too.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
        """
        self._forget_secrets()
        own, head_weights = split_update(weights)
        specialist, head = self._start.specialist(own, self.round + 1), self._start.head(head_weights)
        cases = self.scans.usable(Role.VALIDATION)
        scores: list[list[ClassScore | None]] = []
        for done, case in enumerate(cases):
            self.progress("evaluate", done, len(cases), "scans")
            scores.append(self._score(case, specialist))
        self.progress("evaluate", len(cases), len(cases), "scans")
        self.state.save_scored(self.round, _cpu(specialist.state_dict()))
        if final:
            self._draw(specialist, head)
        means = mean_scores(scores, self.plan.class_names, self.config.egress.validation_scores)
        owners = [self.scans.patient(case) for case in cases]
        patients = score_patients(scores, owners, self.plan.class_names)
        return SiteReport({"validation": len(cases)} | means, patients=patients)

    def pseudo_label(self, case: Case, weights: Mapping[str, Tensor]) -> PseudoLabel | None:
        """Return a pseudo-label of one scan, on the plan's grid, with a given specialist in the teacher's place.

        It is not stored. None if the case is quarantined, or if this site cannot make pseudo-labels under the plan.

        Args:
            case: one of `scans.usable(...)`.
            weights: the tensors as the server sends them, the specialist's and the feature head's.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
        """
        own, head_weights = split_update(weights)
        return self._asked(case, self._start.specialist(own, self.round), self._start.head(head_weights))

    @cached_property
    def secure(self) -> SecureRound | None:
        """This round's part in the secure sum; None if the plan does not ask for one."""
        if self.plan.aggregation.secure is None:
            return None
        return SecureRound(self.state.folder, self.config.site, self.plan, self.round)

    def _forget_secrets(self) -> None:
        if self.secure is not None:
            self.secure.discard()

    @cached_property
    def _labeler(self) -> Labeler:
        return Labeler(self.config, self.plan, self.state.folder, self.device, self.progress)

    def _patients(self, scalars: Iterable[str], labels: Mapping[str, StoredPseudoLabel]) -> dict[str, int]:
        """Return about how many patients each mean of a training round is."""
        labeled, trained = self.scans.usable(Role.LABELED), self.scans.usable(Role.LABELED, Role.UNLABELED)
        accepted = [case for case in trained if _accepted(labels.get(case.id))]
        return training_patients(scalars, *(self.scans.patient_count(cases) for cases in (labeled, trained, accepted)))

    def _loaders(
        self, labels: Mapping[str, StoredPseudoLabel], cases: Sequence[Case] | None = None
    ) -> tuple[list[Loader], list[Loader]]:
        """Return loaders of labeled and of unlabeled scans, the latter with their pseudo-labels.

        A scan without an accepted pseudo-label is left out if the regularizer does not learn from it either.

        Args:
            labels: case -> pseudo-label.
            cases: those to load; None for all that are trained on.
        """
        cases = self.scans.usable(Role.LABELED, Role.UNLABELED) if cases is None else cases
        labeled = [self.scans.training_loader(case) for case in cases if case.role is Role.LABELED]
        regularized = teaches(self.plan.regularizer.name, len(labeled))
        unlabeled = [
            self.scans.training_loader(case, labels.get(case.id))
            for case in cases
            if case.role is Role.UNLABELED and (regularized or _accepted(labels.get(case.id)))
        ]
        return labeled, unlabeled

    def _score(self, case: Case, specialist: nn.Module) -> list[ClassScore | None]:
        scan, annotated = self.scans.load(case), self.scans.annotated
        if scan is None:
            return [None] * len(self.plan.class_names)
        found = segment_original(specialist, scan, self.plan, self.device, scratch=self.config.storage.scratch())
        label, geometry = load_original_label(case, self.plan)
        scores = score_case(
            found,
            keep_classes(label, annotated),
            len(self.plan.class_names),
            geometry.spacing_mm,
            self.plan.evaluation.surface_tolerance_mm,
        )
        scores = [score if k in annotated else None for k, score in enumerate(scores, start=1)]
        names = {k: self.plan.class_names[k - 1] for k in annotated}
        log_scores(self.state.folder / "scores.jsonl", self.round, case.id, scores, names)
        return scores

    def _draw(self, specialist: nn.Module, head: FeatureHead | None) -> None:
        """Draw one case: scan, label, pseudo-label and prediction. The picture stays at the site."""
        roles = (Role.VALIDATION, Role.UNLABELED, Role.LABELED)
        cases = next((usable for role in roles if (usable := self.scans.usable(role))), [])
        if not cases or (scan := self.scans.load(cases[0])) is None:
            return
        on_plans_grid, scratch = replace(scan, original=scan.grid), self.config.storage.scratch()
        found = segment_original(specialist, on_plans_grid, self.plan, self.device, scratch=scratch)
        pseudo = self._asked(cases[0], specialist, head)
        panel = Panel(
            site=self.config.site,
            image=scan.image[0],
            truth=scan.label,
            pseudo_label=pseudo.target if pseudo is not None else None,
            prediction=found,
            classes=len(self.plan.class_names),
            spacing_mm=scan.grid.spacing_mm,
        )
        draw_overview(panel, self.state.folder / "overview.png")

    def _asked(self, case: Case, specialist: nn.Module, head: FeatureHead | None) -> PseudoLabel | None:
        """Make a pseudo-label for the picture, unless all scans of the site have labels: then it is not worth it."""
        if not self.scans.usable(Role.UNLABELED):
            return None
        pair = self.scans.load_pair(case)
        if pair is None or not self._labeler.active:
            return None
        return self._labeler.ask(case.id, pair, specialist, self._known(), head)


def derive_seed(seed: int, site: str, round_number: int) -> int:
    """Return a seed below 2**31 that depends on the plan's seed, the site's name and the round."""
    digest = hashlib.sha256(f"{seed}|{site}|{round_number}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _accepted(label: StoredPseudoLabel | None) -> bool:
    return label is not None and bool(label.valid.any())


def _cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
