"""One target tracked through the slices of a scan by SAM 2 and its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.generalists.sam_queries import Query

_CORNERS = (2, 3)  # labels of a box's upper left and lower right corner; clicks have 1 or 0
_NO_POINT = -1


@dataclass(frozen=True, eq=False)
class Features:
    """The encoder's output for one slice, in the form that SAM 2's tracker takes.

    Attributes:
        maps: (tokens, 1, channels) of each level, finest first.
        position: (tokens, 1, channels), positional encoding of the coarsest level.
        sizes: (rows, columns) of each level.
    """

    maps: list[Tensor]
    position: Tensor
    sizes: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Answer:
    """SAM 2's answer about the target on one slice.

    Attributes:
        logits: (1, S, S), over the whole frame.
        quality: predicted IoU in [0, 1]; if the model sees no target and gives an empty answer, its probability that
            there is none.
    """

    logits: Tensor
    quality: float


class Track:
    """The memory of one target: the answers so far, from which further slices are answered.

    The steps, and what each keeps in memory, are those of the package's `SAM2VideoPredictor`, which cannot be used
    itself: it reads images from disk and drops the predicted IoU.
    """

    def __init__(self, network: Any, features: Callable[[int], Features], first: int, length: int) -> None:
        """Start with an empty memory.

        Args:
            network: SAM 2, frozen and on its device.
            features: slice -> its features on that device.
            first: the lowest slice of the track.
            length: the number of slices from there to the highest.
        """
        self._network = network
        self._features = features
        self._first = first
        self._length = length
        self._memory: dict[str, dict[int, dict[str, Any]]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        self._reach = max(network.num_maskmem, network.max_obj_ptrs_in_encoder)

    def prompt(self, query: Query) -> Answer:
        """Answer a prompted slice independently of the others and add it to the memory.

        In a track of several slices, a mask without box or points is taken as the truth of its slice, and so as the
        answer, as in SAM 2's training. In a track of one slice, or with a box or points, a mask is an initial guess.
        """
        points, mask, guess = self._inputs(query)
        return self._step(query.index, points, mask, guess, reverse=False)

    def carry(self, index: int, reverse: bool) -> Answer:
        """Answer a slice from memory.

        Args:
            index: a slice next to one that was answered, or the first after a prompted one.
            reverse: whether the track runs from high slices to low ones.
        """
        answer = self._step(index, None, None, None, reverse)
        frame = index - self._first
        self._memory["non_cond_frame_outputs"].pop(frame + self._reach if reverse else frame - self._reach, None)
        return answer

    def turn_back(self) -> None:
        """Forget all but the prompted slices, so that both directions start from the same memory."""
        self._memory["non_cond_frame_outputs"].clear()

    def _inputs(self, query: Query) -> tuple[dict[str, Tensor] | None, Tensor | None, Tensor | None]:
        """Return points, a mask taken as the truth (1, 1, S, S), and logits of an initial guess (1, 1, S, S)."""
        device = self._network.device
        logits = None if query.mask is None else query.mask[None].to(device)
        coordinates = [*_corners(query), *query.points]
        labels = [*(_CORNERS if query.box else ()), *query.labels]
        if not coordinates:
            if logits is not None and self._length > 1:
                return None, (logits >= 0).float(), None
            coordinates, labels = [(0.0, 0.0)], [_NO_POINT]
        points = {
            "point_coords": torch.tensor([coordinates], device=device) - 0.5,  # the prompt encoder adds half a pixel
            "point_labels": torch.tensor([labels], dtype=torch.int32, device=device),
        }
        return points, None, logits

    @torch.inference_mode()
    def _step(
        self, index: int, points: dict[str, Tensor] | None, mask: Tensor | None, guess: Tensor | None, reverse: bool
    ) -> Answer:
        features = self._features(index)
        frame = index - self._first
        prompted = points is not None or mask is not None
        _, heads, _, _ = self._network._track_step(
            frame_idx=frame,
            is_init_cond_frame=prompted,
            current_vision_feats=features.maps,
            current_vision_pos_embeds=[features.position],
            feat_sizes=features.sizes,
            point_inputs=points,
            mask_inputs=mask,
            output_dict=self._memory,
            num_frames=self._length,
            track_in_reverse=reverse,
            prev_sam_mask_logits=guess,
        )
        _, _, overlaps, logits, _, pointer, presence = heads
        if self._length > 1:
            kept = self._memory["cond_frame_outputs" if prompted else "non_cond_frame_outputs"]
            kept[frame] = self._remembered(features, logits, pointer, presence, prompted)
        return Answer(logits[:, 0], _quality(overlaps, presence))

    def _remembered(
        self, features: Features, logits: Tensor, pointer: Tensor, presence: Tensor, prompted: bool
    ) -> dict[str, Any]:
        side = self._network.image_size
        memory, position = self._network._encode_new_memory(
            current_vision_feats=features.maps,
            feat_sizes=features.sizes,
            pred_masks_high_res=F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False),
            object_score_logits=presence,
            is_mask_from_pts=prompted,
        )
        # The model was trained to read its memory in this precision, so it is used on a CPU too.
        return {"maskmem_features": memory.to(torch.bfloat16), "maskmem_pos_enc": position, "obj_ptr": pointer}


def _corners(query: Query) -> list[tuple[float, float]]:
    if query.box is None:
        return []
    left, top, right, bottom = query.box
    return [(left, top), (right, bottom)]


def _quality(overlaps: Tensor, presence: Tensor) -> float:
    """Return the predicted IoU of the answer (the best of several), or the probability that there is no target."""
    quality = overlaps.float().max() if float(presence) > 0 else torch.sigmoid(-presence.float())
    return min(max(float(quality), 0.0), 1.0)
