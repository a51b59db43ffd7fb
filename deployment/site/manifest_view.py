"""`semisam site manifest`: what would leave this site, for people to read before they approve it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console

from client.manifest import Manifest, MessageItems, ScalarItem
from engines.tables import FittingTable
from semisam_core.contract import TensorSpec
from semisam_core.text import printable

BESIDES = (
    "Beside this, whoever runs the server sees what any client shows: this site's address and public key, when it is "
    "connected, how long it works on a message, and the versions of Flower, Python and the platform. Sizes are of "
    "values; names and Flower's framing come on top. A message that the server asks for again leaves again."
)


def show_manifest(manifest: Manifest, console: Console) -> None:
    """Print a manifest: per kind of message its texts, numbers, tensors and bytes, then the total and the hash."""
    for kind, items in manifest.messages.items():
        console.print(f"\n{kind}: {_when(items)}", highlight=False, style="bold")
        texts = FittingTable("text", "form")
        for name, text in items.texts.items():
            texts.add(name, printable(text.pattern) or "(empty)")
        console.print(texts)
        if items.scalars:
            numbers = FittingTable("number", "range", "rounding", "withheld")
            for name, scalar in items.scalars.items():
                numbers.add(printable(name), _range(scalar), str(scalar.rounding), _withheld(scalar))
            console.print(numbers)
        if items.tensors:
            console.print(_tensors(items.tensors))
            if items.tensor_bytes > items.tensor_bytes_limit:
                console.print(
                    "egress.maximum_update_mb is smaller than these, so they would not leave.", style="yellow"
                )
        if items.change_of:
            console.print("These hold, coded, the change since the weights that the site received, of:")
            console.print(_tensors(items.change_of))
    console.print(
        f"\nIn a study of {manifest.rounds} rounds at most {manifest.most_bytes:,} bytes.\n{BESIDES}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Manifest {manifest.hash}", highlight=False, soft_wrap=True)


def _tensors(specs: Mapping[str, TensorSpec]) -> FittingTable:
    table = FittingTable("tensor", "shape", "dtype", "bytes", numbers_from=3)
    for name, spec in specs.items():
        size = math.prod(spec.shape) * spec.dtype.itemsize
        shape = " x ".join(map(str, spec.shape)) or "one value"
        table.add(printable(name), shape, str(spec.dtype).removeprefix("torch."), str(size))
    return table


def _when(items: MessageItems) -> str:
    often = {0: "only when something is wrong", 1: "once"}.get(items.times, f"{items.times} times")
    return f"{often}, each at most {items.most_bytes:,} bytes"


def _range(item: ScalarItem) -> str:
    lowest = f"{item.lowest:g}" if math.isfinite(item.lowest) else "any"
    highest = f" to {item.highest:g}" if math.isfinite(item.highest) else " or more" if lowest != "any" else ""
    return f"{lowest}{highest}{', whole' if item.whole else ''}"


def _withheld(item: ScalarItem) -> str:
    return f"below {item.minimum_patients} patients" if item.minimum_patients else ""
