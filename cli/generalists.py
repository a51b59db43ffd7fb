"""The list of generalists: what each takes, may be used for and has seen, and what it costs on this machine."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from client.site_config import SiteConfig, load_site_config
from semisam_core.errors import WeightsError
from semisam_core.generalists import GeneralistSpec, generalist_names, generalist_spec, load_generalist
from semisam_core.prompting.timing import measure


def show_generalists(site: Path | None, timed: bool, console: Console) -> None:
    """Print one row a generalist, then what is published of its weights and training data.

    Args:
        site: a site's YAML whose weights are looked for; None looks for packaged ones only.
        timed: whether models whose weights are here are timed on a standard scan.
        console: where to print.

    Raises:
        ConfigError: the site's YAML is wrong.
    """
    config = load_site_config(site) if site is not None else None
    device = config.torch_device() if config is not None else _best_device()
    if config is not None and config.threads is not None:
        torch.set_num_threads(config.threads)
    title = f"Generalists on {device}" + (f", site {config.site}" if config is not None else "")
    table = Table(title=title, caption="Seconds: one standard scan, encoded once + one prompt set at each refresh.")
    for column in ("name", "prompts", "weights", "seconds a scan"):
        table.add_column(column, no_wrap=column == "name")
    problems: list[str] = []
    for name in generalist_names():
        spec = generalist_spec(name)
        with console.status(f"{name} ..."):
            state, seconds = _state(spec, config, device, timed, problems)
        prompts = ", ".join(sorted(kind.value for kind in spec.card.prompt_kinds))
        table.add_row(name, prompts, state, seconds)
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    for name in generalist_names():
        card = generalist_spec(name).card
        console.print(f"\n{name}", style="bold", highlight=False)
        console.print(f"  licence: {card.licence}", markup=False, highlight=False)
        console.print(f"  published as: {card.source}", markup=False, highlight=False)
        console.print(f"  trained on: {' '.join(card.training_data)}", markup=False, highlight=False)
        seen = "; ".join(card.overlaps) or "none known"
        console.print(f"  benchmarks it may have seen: {seen}", markup=False, highlight=False)


def _state(
    spec: GeneralistSpec, config: SiteConfig | None, device: torch.device, timed: bool, problems: list[str]
) -> tuple[str, str]:
    """Return what to say of a model's weights, and of its time."""
    if not spec.installed:
        return f"needs the extra {spec.extra}", "-"
    entry = config.generalists.get(spec.name) if config is not None else None
    if entry is None and not spec.packaged:
        return "not here", "-"
    weights = None if entry is None or entry.weights == "packaged" else Path(entry.weights)
    try:
        model = load_generalist(spec.name, device, weights, entry.sha256 if entry is not None else None)
    except WeightsError as error:
        problems.append(str(error))
        return "cannot be used, see below", "-"
    found = f"{'packaged' if weights is None else 'file'}, {model.weights_sha256[:12]}"
    if not timed:
        return found, "-"
    timing = measure(model)
    return found, f"{timing.encode_s:.1f} + {timing.answer_s:.1f}"


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
