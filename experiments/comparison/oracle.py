"""A generalist alone, prompted with the true masks: how good its answers are when its prompts are perfect.

This uses the labels of the cases that are scored. It is an upper bound on what prompts can get out of a model, not a
result that can be had in practice.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

import torch
from torch import Tensor

from client.progress import ProgressLog
from client.site_config import SiteConfig, annotated_classes, inventory, load_site_folder
from engines.run_state import run_name
from semisam_core.data.cases import Case, Role
from semisam_core.data.scans import Scan, keep_classes, load_original_label, load_scan, to_original
from semisam_core.errors import CaseError, SemiSAMError
from semisam_core.evaluation import score_case
from semisam_core.files import append_json_line, read_json_lines, write_json
from semisam_core.generalists import EmbeddingStore, Generalist, load_generalist
from semisam_core.plan import Plan, load_plan
from semisam_core.plan_sections.pseudo_labels import Strategy
from semisam_core.prompting import Region
from semisam_core.pseudo_labels.ensemble import GeneralistEnsemble
from semisam_core.pseudo_labels.fusion import settle_overlaps
from semisam_core.pseudo_labels.policy import policy_of

logger = logging.getLogger(__name__)
SELECTED_BY = "nothing is trained or selected; prompts come from the labels of the scored cases"


class OracleFailedError(SemiSAMError):
    """A generalist that could not answer perfect prompts, or no case to prompt it on."""


def execute(plan_path: Path, sites: Path, folder: Path, generalist: str, clicks: int | None) -> None:
    """Score a generalist on the validation cases of every site that has it, and leave a record like any run.

    Args:
        plan_path: the plan whose planes, slice step, classes and generalists' grid are used.
        sites: folder of site files.
        folder: the run folder. A killed run resumes with the cases that have no score yet.
        generalist: the generalist's name.
        clicks: number of clicks per volume or per slice; None prompts with tight boxes.

    Raises:
        SemiSAMError: a file or the weights cannot be used, the generalist fails, or no case could be scored. The
            reason is also in status.json.
    """
    plan = load_plan(plan_path)
    name = _name(folder, plan, generalist)
    write_json(folder / "status.json", {"state": "running", "reason": "", "run": name})
    try:
        configs = [config for config in load_site_folder(sites) if generalist in config.generalists]
        scored = [_Oracle(config, plan.as_generalists_see, name, generalist, clicks).score() for config in configs]
        if not any(scored):
            raise OracleFailedError(
                f"{generalist}: no validation case could be scored in {sites}. A site needs this generalist and "
                "readable validation cases whose labels show a class of the plan."
            )
    except BaseException as error:
        reason = str(error) if isinstance(error, SemiSAMError) else f"{type(error).__name__}: {error}"
        write_json(folder / "status.json", {"state": "failed", "reason": reason, "run": name})
        raise
    append_json_line(folder / "metrics.jsonl", {"event": "selected", "round": 0, "by": SELECTED_BY})
    write_json(folder / "status.json", {"state": "completed", "reason": "", "run": name})


class _Oracle:
    """One generalist at one site."""

    def __init__(self, config: SiteConfig, plan: Plan, run: str, generalist: str, clicks: int | None) -> None:
        self._config, self._plan = config, plan
        self._folder = config.storage.folder / "runs" / run
        self._progress = ProgressLog(self._folder / "progress.jsonl", 0)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        entry = config.generalists[generalist]
        weights = None if entry.weights == "packaged" else Path(entry.weights)
        self._generalist: Generalist = load_generalist(generalist, config.torch_device(), weights, entry.sha256)
        self._store = EmbeddingStore(config.storage.folder / "embeddings", int(config.storage.embeddings_gb * 1e9))
        self._annotated = annotated_classes(config, plan)
        policy = policy_of(plan)
        changes: dict[str, object] = {"strategy": Strategy.BOXES, "margins_mm": (0.0,), "smooth_slices": 1}
        if clicks is not None:
            changes |= {"strategy": Strategy.POINTS, "clicks": clicks}
        self._policy = policy.model_copy(update={"prompting": policy.prompting.model_copy(update=changes)})

    def score(self) -> bool:
        """Score every validation case without a score; return whether any case has one now."""
        scores = self._folder / "scores.jsonl"
        done = {(line["case"], line["class"]) for line in read_json_lines(scores)}
        cases = inventory(self._config, self._plan).of(Role.VALIDATION)
        for number, case in enumerate(cases):
            self._progress("oracle", number, len(cases), "scans")
            if not {(case.id, self._plan.class_names[k - 1]) for k in self._annotated} <= done:
                self._score(case)
        self._progress("oracle", len(cases), len(cases), "scans")
        return any("dice" in line for line in read_json_lines(scores))

    def _score(self, case: Case) -> None:
        try:
            scan = load_scan(case, self._plan, self._config.storage.folder / "prepared", self._config.storage.memory_gb)
            label, geometry = load_original_label(case, self._plan)
        except CaseError as error:
            logger.warning("Case left out: %s", error)
            return
        answered = to_original(self._answer(scan), scan)
        prediction = torch.cat([torch.full_like(answered[:1], 0.5), answered]).argmax(0)
        tolerance = self._plan.evaluation.surface_tolerance_mm
        truth = keep_classes(label, self._annotated)
        scores = score_case(prediction, truth, len(self._plan.class_names), geometry.spacing_mm, tolerance)
        for k in self._annotated:
            score = scores[k - 1]
            line = {"round": 0, "case": case.id, "class": self._plan.class_names[k - 1]}
            append_json_line(self._folder / "scores.jsonl", line | (vars(score) if score else {}))

    def _answer(self, scan: Scan) -> Tensor:
        """Return the probability of each class (K, H, W, D); 0 for classes that the true mask does not have."""
        if scan.label is None:
            raise OracleFailedError(f"{scan.id}: a validation case without a label has no true mask to prompt with.")
        ensemble = GeneralistEnsemble(
            scan.image[0],
            self._plan.data.spacing_mm,
            [self._generalist],
            self._store,
            self._policy,
            lambda done, total: self._progress("embed", done, total, "slices"),
        )
        answers = []
        for k in range(1, len(self._plan.class_names) + 1):
            mask = scan.label == k
            if k not in self._annotated or not bool(mask.any()):
                answers.append(torch.zeros(mask.shape))
                continue
            others = torch.zeros_like(mask)  # clicks in other classes would add to the number of clicks
            region = Region(mask.numpy(), others.numpy(), self._plan.data.spacing_mm)
            outputs = ensemble.ask(region, mask.float())
            if not outputs:
                raise OracleFailedError(
                    f"{self._generalist.card.name} could not segment a scan of {self._config.site}; the log says why."
                )
            answers.append(torch.stack(list(outputs[self._generalist.card.name].maps)).mean(0))
        return settle_overlaps(torch.stack(answers))


def _name(folder: Path, plan: Plan, generalist: str) -> str:
    name = run_name(folder)
    if name == "none":
        name = f"oracle-{generalist[:40]}-{secrets.token_hex(4)}"
        write_json(folder / "run.json", {"run": name, "plan_hash": plan.hash})
    return name
