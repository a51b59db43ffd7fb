"""One target on its way through the slices of a scan, remembered by SAM 2 from slice to slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semisam_core.generalists.sam_queries import Query

_CORNERS = (2, 3)  # labels of the upper left and the lower right corner of a box, where a click has 1 or 0
_NO_POINT = -1


@dataclass(frozen=True, eq=False)
class Features:
    """What SAM 2's encoder says of one slice, as its tracker takes it.

    Attributes:
        maps: (tokens, 1, channels) of each level, finest first.
        position: (tokens, 1, channels), where the tokens of the coarsest level are.
        sizes: (rows, columns) of each level.
    """

    maps: list[Tensor]
    position: Tensor
    sizes: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Answer:
    """What SAM 2 says of the target on one slice.

    Attributes:
        logits: (1, S, S), over the whole frame.
        quality: predicted overlap with the truth in [0, 1]; where the model sees no target, and so answers with
            nothing, its probability that there is none.
    """

    logits: Tensor
    quality: float


class Track:
    """The answers about one target so far, which are the memory that further slices are answered from.

    The steps, and what is remembered of each, are those of the package's `SAM2VideoPredictor`, which keeps them
    together with pictures that it reads from disk, and drops the predicted overlap.
    """

    def __init__(self, network: Any, features: Callable[[int], Features], first: int, length: int) -> None:
        """Begin without any memory.

        Args:
            network: SAM 2, frozen and on its device.
            features: slice -> its features on that device.
            first: the lowest slice that will be asked about.
            length: slices from there to the highest.
        """
        self._network = network
        self._features = features
        self._first = first
        self._length = length
        self._memory: dict[str, dict[int, dict[str, Any]]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        self._reach = max(network.num_maskmem, network.max_obj_ptrs_in_encoder)

    def prompt(self, query: Query) -> Answer:
        """Answer a prompted slice, without regard to the others, and remember it.

        A mask alone is taken as the truth of its slice, and so as the answer, if others will be answered from it: SAM
        2 was trained so. If none will be, it is a first guess, like a mask that comes with a box or points.
        """
        points, mask, guess = self._inputs(query)
        return self._step(query.index, points, mask, guess, reverse=False)

    def carry(self, index: int, reverse: bool) -> Answer:
        """Answer a slice from memory.

        Args:
            index: the slice next to one that was answered, or the first one after a prompted one.
            reverse: whether slices are gone through from the highest to the lowest.
        """
        answer = self._step(index, None, None, None, reverse)
        frame = index - self._first
        self._memory["non_cond_frame_outputs"].pop(frame + self._reach if reverse else frame - self._reach, None)
        return answer

    def turn_back(self) -> None:
        """Forget all but the prompted slices, so that both directions start alike."""
        self._memory["non_cond_frame_outputs"].clear()

    def _inputs(self, query: Query) -> tuple[dict[str, Tensor] | None, Tensor | None, Tensor | None]:
        """Return points, a mask that is the truth (1, 1, S, S), and logits of a first guess (1, 1, S, S)."""
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
        # In the package's precision, on a CPU too: it is what the model was trained to read.
        return {"maskmem_features": memory.to(torch.bfloat16), "maskmem_pos_enc": position, "obj_ptr": pointer}


def _corners(query: Query) -> list[tuple[float, float]]:
    if query.box is None:
        return []
    left, top, right, bottom = query.box
    return [(left, top), (right, bottom)]


def _quality(overlaps: Tensor, presence: Tensor) -> float:
    """Return the predicted overlap of the answer, which is the best of several, or the probability of no target."""
    quality = overlaps.float().max() if float(presence) > 0 else torch.sigmoid(-presence.float())
    return min(max(float(quality), 0.0), 1.0)
