"""A hospital's local work: join, train a round, evaluate. Knows nothing of how messages travel."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean

import torch
from torch import Tensor, nn

from client.labeling import Labeler, ScanPair
from client.progress import ProgressLog
from client.site_config import SiteConfig, annotated_classes, inventory
from client.state import RunState
from semisam_core.contract import disagreement, specialist_spec, tensor_specs, travelling
from semisam_core.data.cases import Case, Inventory, Quarantined, Role
from semisam_core.data.patches import TrainingScan
from semisam_core.data.scans import Scan, keep_classes, load_original_label, load_scan, to_original
from semisam_core.errors import CaseError, SemiSAMError
from semisam_core.evaluation import ClassScore, score_case, summarise
from semisam_core.files import append_json_line, write_json
from semisam_core.inference import new_specialist, predict, segmentation
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal
from semisam_core.pseudo_labels.fusion import PseudoLabel
from semisam_core.regularizers import Regularizer, teaches
from semisam_core.reporting.overview import Panel, draw_overview
from semisam_core.training import LocalRound, new_regularizer, new_teacher, train_round

logger = logging.getLogger(__name__)


class NoUsableCaseError(SemiSAMError):
    """Every case of the site is quarantined."""


class WeightsNotAgreedError(SemiSAMError):
    """The weights that arrived are not the plan's specialist."""


@dataclass(frozen=True)
class SiteReport:
    """Scalars that may leave, and the weights to send (train only)."""

    scalars: dict[str, float | int]
    weights: dict[str, Tensor] | None = None


class Site:
    """One site working on one round of one run of one plan.

    Args:
        config: the site's YAML.
        plan: the study plan, already accepted.
        run: the run's name.
        round_number: counts from 1; 0 while joining.

    Raises:
        ConfigError: folders or lists of the YAML are wrong, or nothing could teach here.
        ValueError: the run's name is malformed.
    """

    def __init__(self, config: SiteConfig, plan: Plan, run: str, round_number: int) -> None:
        self.config, self.plan, self.round = config, plan, round_number
        self.state = RunState(config.storage.folder, run)
        self.progress = ProgressLog(self.state.folder / "progress.jsonl", round_number)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = config.torch_device()
        self._found: Inventory = inventory(config, plan)
        self._annotated = annotated_classes(config, plan)
        self._checked = False
        self._quarantined: dict[str, Quarantined] = {q.id: q for q in self._found.quarantined}
        self._cache: OrderedDict[str, Scan] = OrderedDict()

    def join(self) -> SiteReport:
        """Check every case, quarantine the bad ones, prepare the good ones, and report counts.

        Raises:
            NoUsableCaseError: nothing is left to train on or to score.
            WeightsError: a generalist's weights are missing or altered.
        """
        self._check_cases()
        write_json(
            self.state.folder / "quarantine.json",
            [{"case": q.id, "reason": q.reason} for q in self._quarantined.values()],
        )
        if not self._usable(*Role):
            raise NoUsableCaseError(f"site {self.config.site}: all {len(self._quarantined)} cases are quarantined.")
        return SiteReport(self._counts() | {"generalists": len(self._labeler.generalists)})

    def train(self, weights: Mapping[str, Tensor]) -> SiteReport:
        """Refresh pseudo-labels where due, train one round, and keep all that stays here for the next one.

        That is the teacher, the regularizer's own networks, and the specialist's layers that do not travel.

        Args:
            weights: the specialist as the server sent it.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
            FloatingPointError: training diverged.
        """
        began = time.monotonic()
        specialist = self._specialist(weights, self.round)
        teacher = self._teacher_at_start(specialist)
        regularizer = self._regularizer_at_start()
        labels = self._labeler.labels(self.round, teacher, self._loaders(Role.UNLABELED), self._loaders(Role.LABELED))
        labeled = [self._loader(case, None) for case in self._usable(Role.LABELED)]
        unlabeled = [
            self._loader(case, labels.get(case.id))
            for case in self._usable(Role.UNLABELED)
            if teaches(self.plan.regularizer.name, len(labeled)) or _accepted(labels.get(case.id))
        ]
        seed = derive_seed(self.plan.seed, self.config.site, self.round)
        local = LocalRound(
            plan=self.plan,
            specialist=specialist,
            teacher=teacher,
            labeled=labeled,
            unlabeled=unlabeled,
            number=self.round,
            seed=seed,
            device=self.device,
            regularizer=regularizer,
            annotated=self._annotated,
            progress=lambda done, total: self.progress("train", done, total, "steps"),
        )
        result = train_round(local)
        self.state.save_teacher(self.round, _cpu(teacher.state_dict()))
        if regularizer is not None and regularizer.own is not None:
            self.state.save_networks(self.round, regularizer.own.state())
        if self.plan.specialist.statistics == "local":
            self.state.save_layers(self.round, _cpu(self._staying(specialist)))
        scalars = self._counts()
        for name in ("validation", "quarantined"):
            del scalars[name]
        self._book_gates(labels)
        confidences = [confidence for label in labels.values() for confidence in label.confidences()]
        scalars |= _count_gates(label.refusals for label in labels.values()) | {
            "confidence": fmean(confidences) if confidences else 0.0,
            "steps": result.steps,
            "seconds": time.monotonic() - began,
        }
        for term in ("supervised", "consistency", "generalist"):
            if (value := getattr(result, term)) is not None:
                scalars[f"loss.{term}"] = value
        return SiteReport(scalars, _cpu(travelling(self.plan, specialist)))

    def evaluate(self, weights: Mapping[str, Tensor], final: bool) -> SiteReport:
        """Score the specialist on the classes that the site's validation labels mark, in each scan's own geometry.

        Layers that do not travel are this site's own, as its last training left them. Per-case scores stay in the
        site's storage; means over cases are reported.

        Args:
            weights: the specialist to score.
            final: also draw the site's picture.

        Raises:
            WeightsNotAgreedError: the weights are not the plan's specialist.
        """
        specialist = self._specialist(weights, self.round + 1)
        cases = self._usable(Role.VALIDATION)
        scores: list[list[ClassScore | None]] = []
        for done, case in enumerate(cases):
            self.progress("evaluate", done, len(cases), "scans")
            scores.append(self._score(case, specialist))
        self.progress("evaluate", len(cases), len(cases), "scans")
        if final:
            self._draw(specialist)
        return SiteReport({"validation": len(cases)} | self._mean_scores(scores))

    def _specialist(self, weights: Mapping[str, Tensor], before: int) -> nn.Module:
        """Return the specialist that the server sent, with this site's own layers of rounds before this one."""
        if mistake := disagreement(weights, specialist_spec(self.plan)):
            raise WeightsNotAgreedError(mistake)
        specialist = new_specialist(self.plan)
        own = self._layers_at_start(specialist, before) if self.plan.specialist.statistics == "local" else {}
        specialist.load_state_dict({**specialist.state_dict(), **own, **weights})
        return specialist.to(self.device)

    def _layers_at_start(self, specialist: nn.Module, before: int) -> dict[str, Tensor]:
        kept = self.state.load_layers(before)
        if kept is None:
            return {}
        if mistake := disagreement(kept, tensor_specs(self._staying(specialist))):
            logger.warning("The kept batch-norm layers are of no use and begin anew: %s", mistake)
            return {}
        return kept

    def _staying(self, specialist: nn.Module) -> dict[str, Tensor]:
        sent = travelling(self.plan, specialist)
        return {name: value for name, value in specialist.state_dict().items() if name not in sent}

    def _teacher_at_start(self, specialist: nn.Module) -> nn.Module:
        teacher = new_teacher(specialist)
        if self.plan.teacher.start == "site":
            kept = self.state.load_teacher(self.round - 1)
            if kept is not None and disagreement(kept, tensor_specs(teacher.state_dict())) is None:
                teacher.load_state_dict(kept)
        return teacher

    def _regularizer_at_start(self) -> Regularizer | None:
        regularizer = new_regularizer(self.plan, self.device)
        if regularizer is not None and regularizer.own is not None:
            kept, fresh = self.state.load_networks(self.round), regularizer.own.state()
            if kept is not None and (mistake := disagreement(kept, tensor_specs(fresh))):
                logger.warning("The regularizer's kept networks are of no use and begin anew: %s", mistake)
            elif kept is not None:
                regularizer.own.load(kept)
        return regularizer

    @cached_property
    def _labeler(self) -> Labeler:
        return Labeler(self.config, self.plan, self.state.folder, self.device, self.progress)

    def _score(self, case: Case, specialist: nn.Module) -> list[ClassScore | None]:
        scan = self._scan(case)
        if scan is None:
            return [None] * len(self.plan.class_names)
        probability = to_original(predict(specialist, scan.image, self.plan, self.device), scan)
        label, geometry = load_original_label(case, self.plan)
        scores = score_case(
            segmentation(probability, self.plan),
            keep_classes(label, self._annotated),
            len(self.plan.class_names),
            geometry.spacing_mm,
            self.plan.evaluation.surface_tolerance_mm,
        )
        scores = [score if k in self._annotated else None for k, score in enumerate(scores, start=1)]
        for k in self._annotated:
            name, score = self.plan.class_names[k - 1], scores[k - 1]
            line = {"round": self.round, "case": case.id, "class": name}
            append_json_line(self.state.folder / "scores.jsonl", line | (vars(score) if score else {}))
        return scores

    def _book_gates(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Note for each class how many scans were accepted and refused; stays at the site."""
        for k, name in enumerate(self.plan.class_names if labels else ()):
            counts = _count_gates(label.refusals[k : k + 1] for label in labels.values())
            append_json_line(self.state.folder / "gates.jsonl", {"round": self.round, "class": name, **counts})

    def _mean_scores(self, scores: Sequence[Sequence[ClassScore | None]]) -> dict[str, float | int]:
        scalars: dict[str, float | int] = {}
        for k, name in enumerate(self.plan.class_names):
            summary = summarise(case[k] for case in scores)
            if summary is None:
                continue
            for score in self.config.egress.validation_scores:
                if (value := getattr(summary, score)) is not None:
                    scalars[f"{score}.{name}"] = value
        return scalars

    def _draw(self, specialist: nn.Module) -> None:
        """Draw scan, truth, pseudo-label and prediction of one case; the picture stays at the site."""
        cases = self._usable(Role.VALIDATION) or self._usable(Role.UNLABELED) or self._usable(Role.LABELED)
        if not cases or (scan := self._scan(cases[0])) is None:
            return
        found = segmentation(predict(specialist, scan.image, self.plan, self.device), self.plan)
        pair = self._scan_pair(cases[0])
        pseudo = self._labeler.ask(pair, specialist) if pair is not None and self._labeler.generalists else None
        panel = Panel(
            site=self.config.site,
            image=scan.image[0],
            truth=scan.label,
            pseudo_label=pseudo.generalist if pseudo is not None else None,
            prediction=torch.stack([(found == k).float() for k in range(1, len(self.plan.class_names) + 1)]),
            spacing_mm=scan.grid.spacing_mm,
        )
        draw_overview(panel, self.state.folder / "overview.png")

    def _scan(self, case: Case) -> Scan | None:
        if case.id in self._quarantined:
            return None
        if case.id in self._cache:
            self._cache.move_to_end(case.id)
            return self._cache[case.id]
        scan = self._load(case, self.plan)
        if scan is None:
            return None
        self._cache[case.id] = scan
        limit = self.config.storage.memory_gb * 1e9
        while len(self._cache) > 1 and sum(s.image.nbytes for s in self._cache.values()) > limit:
            self._cache.popitem(last=False)
        return scan

    def _load(self, case: Case, plan: Plan) -> Scan | None:
        try:
            scan = load_scan(case, plan, self.config.storage.folder / "prepared")
        except CaseError as error:
            logger.warning("A case is quarantined: %s", error)
            self._quarantined[case.id] = Quarantined(case.id, str(error))
            return None
        return scan if scan.label is None else replace(scan, label=keep_classes(scan.label, self._annotated))

    def _scan_pair(self, case: Case) -> ScanPair | None:
        scan = self._scan(case)
        seen_by_generalists = self.plan.as_generalists_see
        if scan is None or seen_by_generalists == self.plan:
            return None if scan is None else ScanPair(scan, scan)
        closer = self._load(case, seen_by_generalists)
        return None if closer is None else ScanPair(scan, closer)

    def _check_cases(self) -> None:
        if self._checked:
            return
        for done, case in enumerate(self._found.cases):
            self.progress("prepare", done, len(self._found.cases), "scans")
            self._scan(case)
        self.progress("prepare", len(self._found.cases), len(self._found.cases), "scans")
        self._checked = True

    def _usable(self, *roles: Role) -> list[Case]:
        self._check_cases()
        return [c for c in self._found.cases if c.role in roles and c.id not in self._quarantined]

    def _loaders(self, role: Role) -> list[tuple[str, Callable[[], ScanPair | None]]]:
        return [(case.id, partial(self._scan_pair, case)) for case in self._usable(role)]

    def _loader(self, case: Case, label: PseudoLabel | None) -> Callable[[], TrainingScan]:
        def load() -> TrainingScan:
            scan = self._scan(case)
            if scan is None:
                raise CaseError(f"{case.id}: the case became unusable during the round.")
            if label is None:
                return TrainingScan(scan.image, scan.label)
            return TrainingScan(scan.image, None, label.target, label.uncertainty, label.valid)

        return load

    def _counts(self) -> dict[str, float | int]:
        return {
            "labeled": len(self._usable(Role.LABELED)),
            "unlabeled": len(self._usable(Role.UNLABELED)),
            "validation": len(self._usable(Role.VALIDATION)),
            "quarantined": len(self._quarantined),
        }


def derive_seed(seed: int, site: str, round_number: int) -> int:
    """Return a seed below 2**31 that depends on the plan's seed, the site's name and the round."""
    digest = hashlib.sha256(f"{seed}|{site}|{round_number}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def _accepted(label: PseudoLabel | None) -> bool:
    return label is not None and bool(label.valid.any())


def _count_gates(scans: Iterable[Sequence[Refusal | None]]) -> dict[str, float | int]:
    """Count accepted and refused (scan, class) pairs, the latter by reason."""
    refusals = [refusal for scan in scans for refusal in scan]
    counts: dict[str, float | int] = {
        "accepted": sum(refusal is None for refusal in refusals),
        "gated": sum(refusal is not None for refusal in refusals),
    }
    for refusal in refusals:
        if refusal is not None:
            counts[f"gated.{refusal.value}"] = counts.get(f"gated.{refusal.value}", 0) + 1
    return counts


def _cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
