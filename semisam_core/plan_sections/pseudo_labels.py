"""The plan's section on pseudo-labels: which generalists, how they are prompted, which answers are accepted."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from semisam_core.configuration import Fraction, Spacing, StrictModel
from semisam_core.generalists.base import PromptKind
from semisam_core.generalists.registry import accepted_prompts
from semisam_core.plan_sections.sources import Anatomical, Prototypes, Sources


class Strategy(StrEnum):
    """How the specialist's region becomes prompts; see `semisam_core/prompting/strategies.py`."""

    BOXES = "boxes"
    POINTS = "points"
    MASK = "mask"
    UNCERTAINTY_RECTIFIED = "uncertainty-rectified"
    SCRIBBLES = "scribbles"
    PROPAGATED = "propagated"


_CLICKS = frozenset({PromptKind.POINTS_2D, PromptKind.POINTS_3D})
_MASKS = frozenset({PromptKind.MASK_2D, PromptKind.MASK_3D})
USABLE_KINDS: dict[Strategy, frozenset[PromptKind]] = {  # a generalist must take one of these
    Strategy.BOXES: frozenset({PromptKind.BOX_2D}),
    Strategy.POINTS: _CLICKS,
    Strategy.MASK: _MASKS,
    Strategy.UNCERTAINTY_RECTIFIED: _CLICKS | _MASKS | {PromptKind.BOX_2D},
    Strategy.SCRIBBLES: _CLICKS,
    Strategy.PROPAGATED: frozenset({PromptKind.PROPAGATED}),
}


class Prompting(StrictModel):
    """How the teacher's prediction becomes prompts.

    Attributes:
        strategy: the kind of prompts; each generalist must take them. `uncertainty-rectified` asks with several prompt
            sets, one per margin, whose disagreement is uncertainty.
        planes: the planes in which slice-wise generalists cut a scan; volumetric ones ignore it.
        slice_step_mm: the distance between prompted slices; answers are interpolated between them. 0 prompts every
            slice.
        margins_mm: margins around the region, one prompt set each.
        smooth_slices: slices over which the bounds of boxes are smoothed by a median; odd.
        clicks: successive clicks of `points`, each in the largest error.
        scribble_points: clicks of `scribbles`, per slice or scan.
        span_margin_slices: slices beyond the region to which `propagated` carries its prompts.
        class_aware: whether there are negative clicks in the other classes, if the generalist takes clicks.
        component_share: a component smaller than this share of the largest one does not prompt.
        threshold: probability above which the teacher's prediction is foreground.
    """

    strategy: Strategy = Strategy.UNCERTAINTY_RECTIFIED
    planes: tuple[Anatomical, ...] = Field(default=("axial", "coronal", "sagittal"), min_length=1, max_length=3)
    slice_step_mm: float = Field(default=5.0, ge=0, le=20)
    margins_mm: tuple[float, ...] = Field(default=(0.0,), min_length=1, max_length=16)
    smooth_slices: int = Field(default=5, ge=1, le=31)
    clicks: int = Field(default=5, ge=1, le=64)
    scribble_points: int = Field(default=8, ge=1, le=64)
    span_margin_slices: int = Field(default=2, ge=0, le=64)
    class_aware: bool = True
    component_share: Fraction = 0.3
    threshold: float = Field(default=0.5, gt=0, lt=1)

    @field_validator("smooth_slices")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("the window of the median over slices must be odd")
        return value

    @field_validator("planes")
    @classmethod
    def _once(cls, value: tuple[Anatomical, ...]) -> tuple[Anatomical, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each plane may be named only once")
        return value


class Gates(StrictModel):
    """What a pseudo-label must satisfy to be used in training. Refused ones are counted and reported.

    Attributes:
        minimum_volume_ml: least volume of a structure.
        maximum_volume_ml: largest volume of a structure.
        minimum_agreement: least Dice with the prompted region; with `method: evidence`, least agreement of the sources.
        minimum_quality: least overlap with the truth that the generalists themselves expect.
        minimum_confidence: least mean of exp(-U) over the target's foreground.
        volume_factor: the volume must be within that of the site's own labels, widened by this factor; null is off.
    """

    minimum_volume_ml: float = Field(default=0.5, ge=0)
    maximum_volume_ml: float = Field(default=10_000, gt=0)
    minimum_agreement: Fraction = 0.5
    minimum_quality: Fraction = 0.0
    minimum_confidence: Fraction = 0.0
    volume_factor: float | None = Field(default=None, gt=1, le=100)

    @model_validator(mode="after")
    def _ordered(self) -> Gates:
        if not self.minimum_volume_ml < self.maximum_volume_ml:
            raise ValueError("minimum_volume_ml must be below maximum_volume_ml")
        return self


class Uncertainty(StrictModel):
    """U = prompts * variance over models, planes and prompt sets + specialist * (teacher - generalist)^2, a map.

    Attributes:
        prompts: weight of the variance over models, planes and prompt sets.
        specialist: weight of the squared disagreement of teacher and generalists.
    """

    prompts: float = Field(default=20.0, ge=0)
    specialist: float = Field(default=4.0, ge=0)


class ColdStart(Prototypes):
    """Rough masks from prototypes of each class, before the specialist has learned anything; see `cold_start.py`.

    Up to and including `until_round`, even before `first_round`, they prompt instead of the teacher at sites with
    labeled scans.

    Attributes:
        until_round: the last round in which prototypes prompt.
    """

    until_round: int = Field(ge=1)


class PseudoLabelLoss(StrictModel):
    """L_sam = squared * squared error + cross_entropy * cross-entropy + dice * soft Dice, voxels weighted by exp(-U).

    The squared error is the paper's. Its gradient is small where the student is sure and wrong; cross-entropy and Dice
    are loudest there.

    Attributes:
        squared: weight of the squared error.
        cross_entropy: weight of the cross-entropy.
        dice: weight of the soft Dice loss.
    """

    squared: float = Field(default=1.0, ge=0, le=10)
    cross_entropy: float = Field(default=0.0, ge=0, le=10)
    dice: float = Field(default=0.0, ge=0, le=10)

    @model_validator(mode="after")
    def _teaches(self) -> PseudoLabelLoss:
        if self.squared + self.cross_entropy + self.dice <= 0:
            raise ValueError("at least one of squared, cross_entropy and dice must be above 0")
        return self


class PseudoLabels(StrictModel):
    """Pseudo-labels and their loss L_sam, weighted by lambda_s(t).

    Attributes:
        method: under `semisam+`, the paper's, generalists prompted by the teacher make the pseudo-label. Under
            `evidence`, all `sources` do: their combination prompts the generalists, whose answer is one more source.
        generalists: the frozen models to ask; a site skips those that it does not have.
        weight: lambda_s where the schedule is highest.
        schedule: `decay` is the paper's weight * exp(-5 (t/T)^2), which trusts generalists less as the specialist
            learns; `ramp-up` rises to the full weight over the first `ramp_share` of the study, since pseudo-labels get
            better; `constant` stays.
        ramp_share: share of the study over which `ramp-up` rises.
        spacing_mm: the grid on which generalists see scans, if other than the specialist's. A grid that is coarse
            enough for fast training shows them too little.
        first_round: first round with pseudo-labels prompted by the teacher, which must have learned something by then.
        refresh_every: rounds between refreshes.
        target: `generalist`: the generalists' answer. `fused`: share * generalists + (1 - share) * teacher, with share
            = generalist_share + share_gain * (1 - agreement), at most 1. The agreement is the Dice overlap of the two:
            the smaller it is, the weaker the specialist.
        generalist_share: share of the generalists where they and the teacher agree.
        share_gain: how much disagreement raises that share.
        smooth_sigma_slices: smoothing of slice-wise answers along the slices, a standard deviation in slices.
        window_overlap: overlap of the sliding window whose predictions become prompts and fused targets; scores use
            `evaluation.overlap`.
    """

    omitted_defaults = ("method", "sources", "window_overlap", "ramp_share", "loss")

    method: Literal["semisam+", "evidence"] = "semisam+"
    generalists: tuple[str, ...]
    sources: Sources = Sources()
    weight: float = Field(default=1.0, ge=0, le=100)
    schedule: Literal["decay", "constant", "ramp-up"] = "decay"
    ramp_share: Fraction = 0.33
    loss: PseudoLabelLoss = PseudoLabelLoss()
    spacing_mm: Spacing | None = None
    first_round: int = Field(default=2, ge=1)
    refresh_every: int = Field(default=1, ge=1)
    target: Literal["generalist", "fused"] = "fused"
    generalist_share: Fraction = 0.5
    share_gain: Fraction = 1.0
    smooth_sigma_slices: float = Field(default=1.0, ge=0, le=10)
    window_overlap: float = Field(default=0.25, ge=0, lt=1)
    prompting: Prompting = Prompting()
    gates: Gates = Gates()
    uncertainty: Uncertainty = Uncertainty()
    cold_start: ColdStart | None = None

    @model_validator(mode="after")
    def _sources_fit(self) -> PseudoLabels:
        if self.method == "semisam+" and not self.generalists:
            raise ValueError("generalists is empty; only method: evidence can do without")
        if self.method == "evidence" and self.cold_start is not None:
            raise ValueError(
                "cold_start does not go with method: evidence, which has sources.prototypes from the start"
            )
        for key, settings in (("prototypes", self.sources.prototypes), ("feature_head", self.sources.feature_head)):
            if settings is not None and settings.generalist not in self.generalists:
                raise ValueError(
                    f"sources.{key}.generalist {settings.generalist} is not in pseudo_labels.generalists; "
                    f"accepted are {', '.join(self.generalists) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _cold_start_fits(self) -> PseudoLabels:
        cold = self.cold_start
        if cold is not None and cold.generalist not in self.generalists:
            raise ValueError(
                f"cold_start.generalist {cold.generalist} is not in pseudo_labels.generalists; "
                f"accepted are {', '.join(self.generalists)}"
            )
        if cold is not None and cold.until_round < self.first_round - 1:
            raise ValueError(
                f"cold_start.until_round ({cold.until_round}) leaves rounds without pseudo-labels before first_round "
                f"({self.first_round}); it must be at least {self.first_round - 1}"
            )
        return self

    @model_validator(mode="after")
    def _prompts_accepted(self) -> PseudoLabels:
        usable = USABLE_KINDS[self.prompting.strategy]
        for name in self.generalists:
            accepted = accepted_prompts(name)
            if not accepted & usable:
                raise ValueError(
                    f"prompting.strategy {self.prompting.strategy.value} makes "
                    f"{', '.join(sorted(usable))}; the generalist {name} takes {', '.join(sorted(accepted))}"
                )
        return self

    def due(self, round_number: int) -> bool:
        """Whether pseudo-labels prompted by the teacher are refreshed in this round (rounds count from 1)."""
        after_cold_start = self.cold_start is not None and round_number == self.cold_start.until_round + 1
        on_schedule = (round_number - self.first_round) % self.refresh_every == 0
        return round_number >= self.first_round and (after_cold_start or on_schedule)

    def cold(self, round_number: int) -> bool:
        """Whether prototypes prompt instead of the teacher in this round, at sites that have any."""
        return self.cold_start is not None and round_number <= self.cold_start.until_round
