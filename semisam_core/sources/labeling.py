"""From all sources to a pseudo-label: combined, prompted once, combined again, gated.

The second version of the method. Prompts come from what the sources say together, not from the specialist alone, and
the generalists' answer is one more source. The target is the combination, U says how sure the combination is of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semisam_core.components import largest_component
from semisam_core.evaluation import dice_of
from semisam_core.plan import Plan
from semisam_core.prompting import Refusal, volume_refusal
from semisam_core.pseudo_labels.calibration import Calibration
from semisam_core.pseudo_labels.fusion import PseudoLabel, cap_all_but, confidence, settle_overlaps
from semisam_core.pseudo_labels.policy import policy_of
from semisam_core.scratch import Scratch
from semisam_core.sources.base import Evidence, Source, SourceName, SourceScan, nothing
from semisam_core.sources.combine import CombinedEvidence, combine_evidence
from semisam_core.sources.generalists import PromptedGeneralists
from semisam_core.sources.volume import at_plausible_volume

logger = logging.getLogger(__name__)

_LEAST_CERTAIN = 0.02  # weight exp(-U) of a voxel that is as likely foreground as not


@dataclass(frozen=True, eq=False)
class LabelRecord:
    """How a pseudo-label came about; stays at the site.

    Attributes:
        label: the pseudo-label.
        combined: what the sources said together, the generalists included.
        reliability: source -> (K,) its score on labeled scans, of those that have one.
    """

    label: PseudoLabel
    combined: CombinedEvidence
    reliability: Mapping[str, Tensor]


class EvidenceLabeler:
    """Makes pseudo-labels of unlabeled scans from all sources of a site.

    Args:
        sources: all but the generalists.
        generalists: prompted by the others' combination; None leaves them out.
        plan: must have `pseudo_labels`; its grid is that of the scans.
        reliability: source -> (K,) from `reliability_of`; see `combine_evidence`.
        calibration: trust in each generalist and plausible volumes.
        volumes_ml: the expected volume of each class; None where unknown, then it is what the specialist finds in
            the scan, if it is a source. Not used if `sources.volume_tolerance` is null.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        generalists: PromptedGeneralists | None,
        plan: Plan,
        reliability: Mapping[str, Tensor] | None = None,
        calibration: Calibration | None = None,
        volumes_ml: Sequence[float | None] = (),
    ) -> None:
        self._sources, self._generalists, self._plan = tuple(sources), generalists, plan
        self._reliability, self._calibration = dict(reliability or {}), calibration or Calibration()
        voxel_ml = math.prod(plan.data.spacing_mm) / 1000
        self._voxels = [None if volume is None else volume / voxel_ml for volume in volumes_ml]

    def label(self, scan: SourceScan) -> LabelRecord:
        """Return the pseudo-label of one scan, in the scan's scratch, and how it came about."""
        evidence = look(self._sources, scan) or {SourceName.SPECIALIST: nothing(scan)}
        combined = self._combine(evidence, scan.scratch)
        refusals: tuple[Refusal | None, ...] = (None,) * scan.classes
        if self._generalists is not None:
            answer, refusals = self._generalists.ask(scan, combined.foreground, self._calibration.trust)
            evidence[SourceName.GENERALISTS] = answer
            combined = self._combine(evidence, scan.scratch)
        return LabelRecord(self._judge(scan, combined, evidence, refusals), combined, self._reliability)

    def _combine(self, evidence: Mapping[str, Evidence], scratch: Scratch) -> CombinedEvidence:
        combined = combine_evidence(evidence, self._reliability, scratch)
        tolerance, foreground = policy_of(self._plan).sources.volume_tolerance, combined.foreground
        for k, target in enumerate(self._plan.task.classes):
            if tolerance is not None and self._voxels:
                expected, factor = self._voxels[k], tolerance
                if expected is None and SourceName.SPECIALIST in evidence:
                    # What it finds in this very scan needs no room for differences between patients.
                    found = evidence[SourceName.SPECIALIST].foreground[k]
                    expected, factor = float(sum(int((each > 0.5).sum()) for (each,) in scratch.blocks(found))), 1.0
                at_plausible_volume(foreground[k], expected, factor, scratch)
            if target.connected:
                cap_all_but(foreground[k], largest_component, scratch)
        return combined

    def _judge(
        self,
        scan: SourceScan,
        combined: CombinedEvidence,
        evidence: Mapping[str, Evidence],
        refusals: Sequence[Refusal | None],
    ) -> PseudoLabel:
        target, uncertainty, own = (scan.maps() for _ in range(3))
        answer, verdicts = evidence.get(SourceName.GENERALISTS), []
        for k in range(scan.classes):
            for y, u, probability in scan.scratch.blocks(target[k], uncertainty[k], combined.foreground[k]):
                y.copy_(sharpened(probability, policy_of(self._plan).sources.sharpness))
                u.copy_(uncertainty_of(y))
            verdicts.append(self._refusal(target[k], uncertainty[k], combined, k, refusals[k], scan.scratch))
            if verdicts[k] is not None:
                for y, u in scan.scratch.blocks(target[k], uncertainty[k]):
                    y.zero_()
                    u.zero_()
            elif answer is not None:
                scan.scratch.copy(own[k], answer.foreground[k])
        if scan.classes > 1:
            target, own = settle_overlaps(target, scan.scratch), settle_overlaps(own, scan.scratch)
        valid = torch.tensor([verdict is None for verdict in verdicts])
        return PseudoLabel(target, uncertainty, valid, tuple(verdicts), own, scan.scratch)

    def _refusal(
        self,
        target: Tensor,
        uncertainty: Tensor,
        combined: CombinedEvidence,
        k: int,
        unprompted: Refusal | None,
        scratch: Scratch,
    ) -> Refusal | None:
        gates, spacing = policy_of(self._plan).gates, self._plan.data.spacing_mm
        voxels = float(sum([int((each > 0.5).sum()) for (each,) in scratch.blocks(target)]))
        if int(combined.sources[k]) == 0 or not voxels:
            return Refusal.EMPTY
        if int(combined.sources[k]) < 2:
            return unprompted or Refusal.UNCORROBORATED
        if refusal := volume_refusal(voxels, spacing, gates):
            return refusal
        if gates.volume_factor is not None:
            seen = self._calibration.volume_range_ml(k, gates.volume_factor)
            if seen and not seen[0] <= voxels * math.prod(spacing) / 1000 <= seen[1]:
                return Refusal.IMPLAUSIBLE
        if float(combined.agreement[k]) < gates.minimum_agreement:
            return Refusal.DISAGREEMENT
        if confidence(target, uncertainty, scratch) < gates.minimum_confidence:
            return Refusal.LOW_CONFIDENCE
        return None


def look(sources: Iterable[Source], scan: SourceScan) -> dict[str, Evidence]:
    """Return each source's evidence about a scan; one that fails is left out and does not stop the others."""
    found: dict[str, Evidence] = {}
    for source in sources:
        try:
            found[source.name] = source.look(scan)
        except (RuntimeError, ValueError) as error:
            logger.warning("The source %s failed on a scan: %s", source.name, error)
    return found


def sharpened(probability: Tensor, sharpness: float) -> Tensor:
    """Return p^s / (p^s + (1 - p)^s): a mean over sources that agree is less sure than it could be."""
    if sharpness == 1:
        return probability
    foreground, background = probability.clamp(0, 1) ** sharpness, (1 - probability).clamp(0, 1) ** sharpness
    return foreground / (foreground + background).clamp_min(1e-12)


def uncertainty_of(target: Tensor) -> Tensor:
    """Return U with exp(-U) = |2 y - 1|: how sure the combination is of its own answer, voxel by voxel.

    The disagreement of a single source with all the others is in y already. Counted once more, it would silence just
    those voxels in which the others correct it.
    """
    return -(2 * target - 1).abs().clamp_min(_LEAST_CERTAIN).log()


def reliability_of(
    sources: Sequence[Source], labeled: Iterable[tuple[SourceScan, Tensor]], annotated: Sequence[int]
) -> dict[str, Tensor]:
    """Score sources on a site's labeled scans, each without having learned from the scan it is scored on.

    Args:
        sources: those that can do without a scan; others get no score.
        labeled: (scan, label (H, W, D) of class indices).
        annotated: the classes (from 1) that the labels mark.

    Returns:
        source -> (K,) mean Dice over the scans; a class that could not be scored has the source's mean over the others.
    """
    scores: dict[str, list[Tensor]] = {}
    for scan, label in labeled:
        for source in sources:
            if (other := source.without(scan.key)) is None:
                continue
            for name, evidence in look([other], scan).items():
                row = torch.full((scan.classes,), torch.nan)
                for k in annotated:
                    if bool((truth := label == k).any()):
                        row[k - 1] = dice_of(scan.scratch.above(evidence.foreground[k - 1], 0.5), truth)
                scores.setdefault(name, []).append(row)
    found = {name: torch.stack(rows).nanmean(0) for name, rows in scores.items()}
    return {
        name: torch.where(score.isnan(), score.nanmean(), score)
        for name, score in found.items()
        if not bool(score.isnan().all())
    }
