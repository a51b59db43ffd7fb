"""Size of stored embeddings, what coding them costs in the generalist's answers, and the store's hit rate.

    python benchmarks/embedding_store.py --images la/images --labels la/labels --scans 4 --spacing 1.25

LiteMedSAM encodes a few axial slices of each scan, and answers a box around the label's foreground on each: from
embeddings in float32, from those that it makes on this machine (`product_dtype`), and from these as the store returns
them. Then passes over the same scans are made with a store of a part of the size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, Spacing
from rich.progress import track
from torch import Tensor

from semisam_core.generalists import (
    EmbeddingStore,
    Generalist,
    Prompts,
    SliceBox,
    VolumeGrid,
    scan_key,
)
from semisam_core.generalists.embedding_codec import decoded, encoded
from semisam_core.generalists.lite_medsam import LiteMedSAM
from semisam_core.generalists.tiny_vit import product_dtype

Example = tuple[Tensor, Tensor, VolumeGrid, list[int]]
CPU = torch.device("cpu")
SHARES = (0.25, 0.5, 0.75)


def _load(path: Path, spacing: float, mode: str) -> Tensor:
    read = Compose(
        [
            LoadImage("NibabelReader", image_only=True),
            EnsureChannelFirst(),
            Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacing((spacing,) * 3, mode=mode, padding_mode="border"),
        ]
    )
    volume: Tensor = read(path).as_tensor()[0]
    return volume


def _examples(images: Path, labels: Path, count: int, spacing: float, slices: int) -> Iterator[Example]:
    for path in sorted(images.glob("*.nii.gz"))[:count]:
        image = _load(path, spacing, "bilinear").float()
        label = _load(labels / path.name, spacing, "nearest") > 0
        shown = label.flatten(0, 1).sum(0)
        units = sorted(shown.topk(slices).indices.tolist())
        height, width, depth = image.shape
        yield (image - image.mean()) / image.std(), label, VolumeGrid((height, width, depth), (spacing,) * 3), units


def _answer(model: Generalist, embeddings: dict[int, Tensor], label: Tensor, grid: VolumeGrid) -> Tensor:
    boxes = []
    for unit in embeddings:
        places = label[:, :, unit].nonzero()
        (top, left), (bottom, right) = places.min(0).values.tolist(), places.max(0).values.tolist()
        boxes.append(SliceBox(unit, (float(top), float(left), float(bottom), float(right))))
    return model.segment(embeddings, Prompts(boxes=tuple(boxes)), grid).probability > 0.5


def _dice(one: Tensor, other: Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def _codec(model: Generalist, exact: Generalist, examples: Sequence[Example]) -> None:
    print(f"{'':>4} {'':>14} {'Dice of':>8} {'change, products':>17} {'the same,':>10}")
    print(f"{'scan':>4} {'times smaller':>14} {'float32':>8} {product_dtype(CPU)!s:>17} {'stored':>10}")
    changes = []
    for number, (image, label, grid, units) in enumerate(track(examples, "encode and answer")):
        plain, made = (each.embed(image, grid, units) for each in (exact, model))
        coded = {unit: each for unit, value in made.items() if (each := encoded(value)) is not None}
        size = sum(each.codes.nbytes + each.steps.nbytes for each in coded.values())
        ratio = 2 * sum(each.numel() for each in made.values()) / size
        stored = {unit: decoded(each) for unit, each in coded.items()}
        truth = torch.zeros_like(label)
        truth[:, :, units] = label[:, :, units]
        before, *after = (_dice(_answer(model, each, label, grid), truth) for each in (plain, made, stored))
        changes.append([each - before for each in after])
        print(f"{number:>4} {ratio:>14.2f} {before:>8.4f} {after[0] - before:>+17.4f} {after[1] - before:>+10.4f}")
    means = torch.tensor(changes).mean(0).tolist()
    print(f"mean {'':>14} {'':>8} {means[0]:>+17.4f} {means[1]:>+10.4f}")


class _Remembering:
    """A generalist that encodes each slice once, however often it is asked."""

    def __init__(self, model: Generalist) -> None:
        self.card, self.weights_sha256 = model.card, model.weights_sha256
        self._model, self._made = model, dict[tuple[str, int], Tensor]()

    def embed(self, volume: Tensor, grid: VolumeGrid, units: Sequence[int]) -> dict[int, Tensor]:
        """Encode slices."""
        key = scan_key(volume)
        for unit in units:
            if (key, unit) not in self._made:
                self._made[key, unit] = self._model.embed(volume, grid, [unit])[unit]
        return {unit: self._made[key, unit] for unit in units}


def _hit_rates(model: Generalist, examples: Sequence[Example]) -> None:
    remembering = cast(Generalist, _Remembering(model))
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        _pass(EmbeddingStore(Path(work) / "all", 10**12), remembering, examples)
        encode_s = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (Path(work) / "all").iterdir())
        began = time.perf_counter()
        _pass(EmbeddingStore(Path(work) / "all", 10**12), model, examples)
        print(f"\nreading is {encode_s / (time.perf_counter() - began):.0f} times faster than encoding")
        for share in SHARES:
            limit = int(share * size)
            rates = [_pass(EmbeddingStore(Path(work) / f"{share}", limit), remembering, examples) for _ in range(3)]
            print(f"limit / size {share:.2f}: hit rates of three passes {', '.join(f'{rate:.2f}' for rate in rates)}")


def _pass(store: EmbeddingStore, model: Generalist, examples: Sequence[Example]) -> float:
    for image, _, grid, units in examples:
        store.fetch(model, scan_key(image), image, grid, units)
    return store.hits / (store.hits + store.misses)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=1.25, help="mm")
    given = parser.parse_args()
    model, exact = LiteMedSAM.load(CPU), LiteMedSAM.load(CPU, dtype=torch.float32)
    examples = list(_examples(given.images, given.labels, given.scans, given.spacing, given.slices))
    _codec(model, exact, examples)
    _hit_rates(model, examples)


if __name__ == "__main__":
    main()
