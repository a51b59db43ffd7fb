"""Which generalists can be used on this machine, and what one scan costs with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from client.site_config import SiteConfig, load_site_config
from engines.tables import FittingTable
from semisam_core.errors import WeightsError
from semisam_core.generalists import GeneralistCard, GeneralistSpec, generalist_names, generalist_spec, load_generalist
from semisam_core.prompting.timing import measure

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Availability:
    """One generalist on this machine.

    Attributes:
        card: what is published about it.
        weights: whether its weights are here, in words.
        seconds: what a scan costs (`encode + prompt`), or `-`.
        problem: why its weights cannot be used; empty where they can, or are not here.
    """

    card: GeneralistCard
    weights: str
    seconds: str
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    """All generalists on one device.

    Attributes:
        title: the device, and the site if one was given.
        generalists: one entry per generalist, by name.
    """

    title: str
    generalists: tuple[Availability, ...]

    def details(self) -> list[str]:
        """Return lines on what cannot be used, and on each generalist's licence and training data."""
        lines = [each.problem for each in self.generalists if each.problem]
        for card in (each.card for each in self.generalists):
            lines += ["", card.name, f"  licence: {card.licence}", f"  published as: {card.source}"]
            lines += [f"  trained on: {' '.join(card.training_data)}"]
            lines += [f"  benchmarks it may have seen: {'; '.join(card.overlaps) or 'none known'}"]
        return lines

    def table(self) -> FittingTable:
        """Return one row per generalist."""
        table = FittingTable(
            "name",
            "prompts",
            "weights",
            "seconds a scan",
            title=self.title,
            caption="Seconds: one standard scan, encoded once + one prompt set at each refresh.",
        )
        for each in self.generalists:
            prompts = ", ".join(sorted(kind.value for kind in each.card.prompt_kinds))
            table.add(each.card.name, prompts, each.weights, each.seconds)
        return table


def survey(site: Path | None, timed: bool, on_start: Callable[[str], None]) -> Survey:
    """Look for every generalist's weights, load those that are here and time them.

    Args:
        site: a site's YAML whose weights are looked for; None looks for packaged ones only.
        timed: whether models whose weights are here are timed on a standard scan.
        on_start: called with the name of each generalist before it is looked at.

    Raises:
        ConfigError: the site's YAML is wrong.
    """
    config = load_site_config(site) if site is not None else None
    device = config.torch_device() if config is not None else _best_device()
    if config is not None and config.threads is not None:
        torch.set_num_threads(config.threads)
    found = []
    for name in generalist_names():
        on_start(name)
        found.append(_availability(generalist_spec(name), config, device, timed))
    return Survey(f"Generalists on {device}" + (f", site {config.site}" if config is not None else ""), tuple(found))


def _availability(spec: GeneralistSpec, config: SiteConfig | None, device: torch.device, timed: bool) -> Availability:
    if not spec.installed:
        return Availability(spec.card, f"needs the extra {spec.extra}", NOT_MEASURED)
    entry = config.generalists.get(spec.name) if config is not None else None
    if entry is None and not spec.packaged:
        return Availability(spec.card, "not here", NOT_MEASURED)
    weights = None if entry is None or entry.weights == "packaged" else Path(entry.weights)
    try:
        model = load_generalist(spec.name, device, weights, entry.sha256 if entry is not None else None)
    except WeightsError as error:
        return Availability(spec.card, "cannot be used, see below", NOT_MEASURED, str(error))
    found = f"{'packaged' if weights is None else 'file'}, {model.weights_sha256[:12]}"
    if not timed:
        return Availability(spec.card, found, NOT_MEASURED)
    timing = measure(model)
    return Availability(spec.card, found, f"{timing.encode_s:.1f} + {timing.answer_s:.1f}")


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
