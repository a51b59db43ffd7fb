"""The examples of docs/extending.md: each is short, and works in a site's own rounds or in a whole study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client.app import app as client_app
from client.site import Site
from client.site_config import load_site_config
from docs.examples import generalist, regularizer, rule, source, specialist
from engines.in_process_grid import run_in_process
from semisam_core.aggregation import RULES
from semisam_core.files import read_json_lines
from semisam_core.generalists import registry
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from semisam_core.regularizers import REGULARIZERS, why_not_private
from semisam_core.sources.base import LabeledScan, SourceScan
from semisam_core.sources.registry import SOURCES
from semisam_core.specialists import SPECIALISTS
from server.app import app as server_app
from tests.conftest import tiny_plan

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
MakeSite = Callable[..., Path]


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Leave the registries as they were."""
    registries = (RULES, REGULARIZERS, SOURCES, SPECIALISTS, registry._SPECS)
    before = [dict(each) for each in registries]
    yield
    for each, entries in zip(registries, before, strict=True):
        each.clear()
        each.update(entries)  # type: ignore[arg-type]


def _round(make_site: MakeSite, plan: Plan, **changes: object) -> tuple[Site, dict[str, float], bool]:
    """Train one round at a site; return it, its report's scalars and whether every tensor has changed."""
    site = Site(load_site_config(make_site(**changes)), plan, "run", 1)
    site.join()
    weights = dict(new_specialist(plan).state_dict())
    report = site.train(weights)
    assert report.weights is not None
    changed = all(not torch.equal(value, weights[name]) for name, value in report.weights.items())
    return site, dict(report.scalars), changed


def test_there_is_an_example_for_every_seam_and_the_page_shows_it_under_forty_lines() -> None:
    assert [path.stem for path in EXAMPLES] == ["generalist", "regularizer", "rule", "source", "specialist"]
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40
        assert f"<!-- insert: examples/{path.name} -->" in page
        assert f"(examples/{path.name})" in page


@pytest.mark.parametrize("example", [generalist, regularizer, rule, source, specialist])
def test_a_part_is_registered_once_under_its_name(example: ModuleType) -> None:
    registries = {
        generalist: registry._SPECS,
        regularizer: REGULARIZERS,
        rule: RULES,
        source: SOURCES,
        specialist: SPECIALISTS,
    }
    entries = registries[example]
    before = set(entries)
    example.register()
    (name,) = set(entries) - before
    entries[name] = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"named {name} is already registered; choose another name"):
        example.register()


def test_the_generalist_labels_unlabeled_scans(make_site: MakeSite) -> None:
    generalist.register()
    plan = tiny_plan("pseudo_labels.generalists=[bright]", "pseudo_labels.prompting.threshold=0.01")
    site, scalars, changed = _round(make_site, plan, generalists={"bright": {"weights": "packaged"}})
    assert scalars["accepted"] == 1
    assert scalars["loss.generalist"] > 0
    assert changed
    assert list((site.config.storage.folder / "embeddings").rglob("*.safetensors"))


def test_the_specialist_trains(make_site: MakeSite) -> None:
    specialist.register()
    plan = tiny_plan("specialist={name: dilated, arguments: {features: 4, layers: 2}}", "data.patch=[15, 17, 9]")
    _, scalars, changed = _round(make_site, plan)
    assert scalars["steps"] == 2
    assert changed
    with pytest.raises(ValueError, match="dilated takes features, layers"):
        tiny_plan("specialist={name: dilated, arguments: {depth: 2}}")


def test_the_regularizer_teaches_and_goes_with_differential_privacy(make_site: MakeSite) -> None:
    regularizer.register()
    plan = tiny_plan("regularizer.name=flip-consistency", "pseudo_labels=null")
    _, scalars, changed = _round(make_site, plan)
    assert scalars["loss.consistency"] > 0
    assert scalars["gradient.consistency"] > 0
    assert changed
    assert why_not_private("flip-consistency") is None


def test_the_source_counts_in_a_sites_pseudo_labels(make_site: MakeSite) -> None:
    source.register()
    sources = "{more: [brightness], registration: null, volume_tolerance: null}"
    plan = tiny_plan("pseudo_labels.method=evidence", f"pseudo_labels.sources={sources}")
    site, scalars, _ = _round(make_site, plan, cases=4, data={"labeled": ["case-0", "case-3"]})
    assert scalars["accepted"] == 1
    (line,) = read_json_lines(site.state.folder / "evidence.jsonl")
    assert line["reliability"]["brightness"] > 0.8  # it is scored on each labeled scan without having seen it
    assert line["weights"]["brightness"] > 0.3


def test_a_source_that_no_code_has_is_refused_when_the_plan_is_read() -> None:
    with pytest.raises(ValueError, match="there is no further source 'brightness'; accepted: none"):
        tiny_plan("pseudo_labels.sources={more: [brightness]}")
    source.register()
    with pytest.raises(ValueError, match="each source may be named only once"):
        tiny_plan("pseudo_labels.sources={more: [brightness, brightness]}")


def test_a_plan_without_further_sources_keeps_its_hash() -> None:
    assert tiny_plan("pseudo_labels.sources={more: []}").hash == tiny_plan("pseudo_labels.sources={}").hash


def test_the_source_says_nothing_of_classes_that_no_label_shows() -> None:
    image = torch.rand(1, 6, 6, 4, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(6, 6, 4, dtype=torch.long)
    label[2:4, 2:4] = 1
    image[0][label == 1] += 3
    found = source.BrightnessSource([LabeledScan("one", image, label)])
    evidence = found.look(SourceScan(image, (1.0, 1.0, 1.0), 2))
    assert evidence.answered.tolist() == [True, False]
    assert float(evidence.foreground[0][label == 1].mean()) > 0.5
    assert float(evidence.foreground[0][label == 0].max()) < 0.01
    assert bool(evidence.foreground.isfinite().all())
    assert found.without("one") is None
    assert not source.BrightnessSource([]).look(SourceScan(image, (1.0,) * 3, 1)).answered.any()


def test_the_rule_combines_a_whole_study(make_site: MakeSite, tmp_path: Path) -> None:
    rule.register()
    changes = ("aggregation.rule=geometric-median", "aggregation.minimum_sites=3", "training.rounds=1")
    plan = tiny_plan(*changes, "pseudo_labels=null")
    assert plan.aggregation.tolerated_sites == 1
    sites = [make_site(name, first_seed=10 * k) for k, name in enumerate(("alpha", "beta", "gamma"))]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
    config: dict[str, str | int] = {"plan": str(path), "num-sites": 3, "run-folder": str(tmp_path / "run")}
    run_in_process(server_app, client_app, [{"site-config": str(site)} for site in sites], config)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    (weights,) = [line["weights"] for line in lines if line["event"] == "aggregated"]
    assert weights == pytest.approx(dict.fromkeys(("alpha", "beta", "gamma"), 1 / 3))
    found, start = (
        load_file(tmp_path / "run" / "checkpoints" / "round-00001.safetensors"),
        new_specialist(plan).state_dict(),
    )
    assert all(not torch.equal(value, start[name]) for name, value in found.items())


@dataclass
class _Update:
    site: str
    value: float
    names: tuple[str, ...] = ("w",)
    scalars: dict[str, float] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.tensor([self.value, -self.value])


def test_the_rule_follows_the_majority() -> None:
    updates = [_Update("a", 1.0), _Update("b", 1.1), _Update("c", 1000.0)]
    combined = rule.geometric_median(updates, [1 / 3] * 3, tiny_plan().aggregation)["w"]
    assert combined.tolist() == pytest.approx([1.1, -1.1], abs=0.05)  # the median of points on a line
