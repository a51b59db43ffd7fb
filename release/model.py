"""Load a trained specialist: from a study's run folder, from one of its checkpoints, or from an exported package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from semisam_core.contract import disagreement, specialist_spec, split_update, weights_sha256
from semisam_core.errors import SemiSAMError
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan, load_plan
from semisam_core.specialists import batch_norm_tensors

PLAN, BEST = "plan.yaml", "best.safetensors"
PACKAGED_PLAN, PACKAGED_WEIGHTS = "extra/plan.yaml", "models/model.safetensors"


class ModelError(SemiSAMError):
    """A model cannot be used; the message says why."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A specialist that was trained, and the plan that says how scans are prepared for it.

    Attributes:
        path: where it was found.
        plan: the study plan.
        specialist: in evaluation mode, on the CPU.
        sha256: hash of its tensors.
        round: the round after which it was kept; None if the file does not say.
    """

    path: Path
    plan: Plan
    specialist: nn.Module
    sha256: str
    round: int | None


def load_model(path: Path, layers: Path | None = None) -> TrainedModel:
    """Load a specialist.

    Args:
        path: a run folder, one of its `checkpoints/round-*.safetensors`, or an exported package.
        layers: with `specialist.statistics: local`, the file of a site's own normalisation layers
            (`layers-*.safetensors` in its storage), which the study's model lacks.

    Raises:
        ModelError: there is no model, it does not fit its plan, or lacks layers that stayed at the sites; or a package
            is not as it was exported.
        ConfigError: the plan beside it is invalid.
    """
    from release.package import MANIFEST, check  # which needs this file's ModelError

    if (path / MANIFEST).exists():
        check(path)
    weights_path, plan_path = _files(path)
    plan = load_plan(plan_path)
    tensors, metadata = read_tensors(weights_path)
    tensors = split_update(tensors)[0]
    if mistake := disagreement(tensors, specialist_spec(plan)):
        raise ModelError(f"{weights_path}: it does not fit {plan_path}: {mistake}.")
    if metadata.get("plan") not in (None, plan.hash):
        raise ModelError(f"{weights_path}: it was trained with another plan than {plan_path}.")
    specialist = new_specialist(plan)
    own = _own_layers(plan, specialist, weights_path, layers)
    specialist.load_state_dict({**specialist.state_dict(), **tensors, **own})
    number = metadata.get("round", "")
    return TrainedModel(
        path, plan, specialist.eval(), weights_sha256({**tensors, **own}), int(number) if number.isdecimal() else None
    )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors and metadata.

    Raises:
        ModelError: it cannot be read, or its tensors are not those whose hash it names.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: it cannot be read ({type(error).__name__}).") from None
    if metadata.get("sha256") not in (None, weights_sha256(tensors)):
        raise ModelError(f"{path}: it is damaged: its tensors do not match its hash.")
    return tensors, metadata


def lacking(plan: Plan) -> str:
    """Return what a model of this plan lacks, in a sentence; empty if it is whole."""
    if plan.specialist.statistics != "local":
        return ""
    return (
        "its batch-norm layers (statistics, scales and shifts) were never shared: each site kept its own "
        "(specialist.statistics: local)"
    )


def _files(path: Path) -> tuple[Path, Path]:
    """Return the files of weights and plan."""
    if path.is_file():
        for folder in (path.parent, path.parent.parent):
            if (folder / PLAN).is_file():
                return path, folder / PLAN
        raise ModelError(f"{path}: there is no {PLAN} beside it or one folder up, which says what it was trained for.")
    for weights, plan in ((BEST, PLAN), (PACKAGED_WEIGHTS, PACKAGED_PLAN)):
        if (path / plan).is_file():
            if not (path / weights).is_file():
                raise ModelError(f"{path}: it has no {weights} yet; a study writes it when it ends.")
            return path / weights, path / plan
    raise ModelError(
        f"{path}: no model is here. Accepted are a run folder ({PLAN} and {BEST}), one of its checkpoints, or an "
        "exported package."
    )


def _own_layers(plan: Plan, specialist: nn.Module, weights: Path, layers: Path | None) -> dict[str, Tensor]:
    if not lacking(plan):
        if layers is not None:
            raise ModelError(f"{layers}: this model needs no layers of a site.")
        return {}
    if layers is None:
        raise ModelError(
            f"{weights}: {lacking(plan)}. Name the file of a site that it is to be used at: layers-*.safetensors in "
            "that site's storage."
        )
    tensors, expected = read_tensors(layers)[0], batch_norm_tensors(specialist)
    state = specialist.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    if not (expected - counters <= set(tensors) <= expected) or any(
        tensors[name].shape != state[name].shape or not bool(torch.isfinite(tensors[name]).all()) for name in tensors
    ):
        raise ModelError(f"{layers}: it does not hold the batch-norm layers of this model.")
    return tensors
