"""The documentation as a site: it builds without a broken link, needs no network, and its reference has every key."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel

from cli.main import app
from client.site_config import SiteConfig
from docs.tools.commands import command_reference
from docs.tools.reference import plan_reference, sections, site_reference
from semisam_core.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


class _Loads(HTMLParser):
    """Collects what a page loads of its own accord, and its identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids.add(named.get("id") or "")
        if tag in ("script", "img", "iframe") or (tag == "link" and named.get("rel") != "canonical"):
            self.loaded += [each for key in ("src", "href") if (each := named.get(key))]


def _build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = _build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _page(path: Path) -> _Loads:
    page = _Loads()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    for name in pages:
        loaded = _page(site / f"{name}.html").loaded
        assert any(each.startswith("assets/") for each in loaded)
        assert [each for each in loaded if "//" in each] == []
    styles = [path.read_text(encoding="utf-8") for path in (site / "assets").rglob("*.css")]
    assert styles
    assert not [text for text in styles if re.search(r"@import|url\(['\"]?(https?:)?//", text)]


def test_nothing_on_a_page_is_left_to_insert_and_files_outside_come_along(site: Path) -> None:
    assert "<!-- insert" not in "".join(path.read_text(encoding="utf-8") for path in site.glob("*.html"))
    copied = site / "repository" / "site_configs" / "left-atrium" / "plan.yaml"
    assert copied.read_bytes() == (ROOT / "site_configs" / "left-atrium" / "plan.yaml").read_bytes()
    assert 'href="repository/site_configs/left-atrium/plan.yaml"' in (site / "reference-plan.html").read_text()
    assert not (site / "tools").exists()


def test_examples_and_the_notebook_are_on_their_pages(site: Path) -> None:
    for page, words in (("extending", "geometric_median"), ("researcher", "initial_weights")):
        text = html.unescape(re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text(encoding="utf-8")))
        assert words in text
    assert (site / "examples" / "rule.py").exists()
    assert (site / "notebook.ipynb").exists()


@pytest.mark.parametrize(
    "link", ["[x](nowhere.md)", "[x](privacy.md#no-such-heading)", "[x](/privacy.md)", "[x](deploy/nothing.yaml)"]
)
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# One\n\n{link}\n", encoding="utf-8")
    (tmp_path / "docs" / "privacy.md").write_text("# Privacy\n", encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[0]
    settings = re.sub(r"^(hooks|docs_dir|exclude_docs):.*\n", "", settings, flags=re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    done = _build(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    assert link[4:-1].partition("#")[0] in done.stderr


def _keys(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for section, each in sections(model):
        yield from ((section, key) for key in each.model_fields)


@pytest.mark.parametrize(("text", "model"), [(plan_reference(), Plan), (site_reference(), SiteConfig)])
def test_every_key_is_in_the_reference_with_what_it_takes_and_what_it_does(text: str, model: type[BaseModel]) -> None:
    rows = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = part.partition("\n")[0]
        rows |= {(title, key): cells for key, *cells in ROW.findall(part)}
    for section, key in _keys(model):
        accepted, _, description = rows[section or "Top level", key]
        assert accepted, (section, key)
        assert len(description) > 8, (section, key)


@pytest.mark.parametrize(("text", "model"), [(plan_reference(), Plan), (site_reference(), SiteConfig)])
def test_no_section_is_left_out_of_the_reference(text: str, model: type[BaseModel]) -> None:
    """By pydantic's own schema, which knows every model below this one."""
    schema = model.model_json_schema()
    keys = {key for each in (schema, *schema["$defs"].values()) for key in each.get("properties", {})}
    assert len(keys) > 25
    assert keys <= {key for key, *_ in ROW.findall(text)}


def test_types_bounds_and_defaults_are_those_of_the_models() -> None:
    plan = plan_reference()
    assert "| `rounds` | whole number from 1 to 10000 | required | Rounds of the study;" in plan
    assert "| `delta` | number above 0 to 0.001 | `1e-05` |" in plan
    assert "| `rule` | `weighted-mean`, `median`, `trimmed-mean`, `krum`, `multi-krum` | `weighted-mean` |" in plan
    assert "| `secure` | [aggregation.secure](#aggregationsecure) or `null` | `null` |" in plan
    assert "| `residual_units` | whole number from 0 to 8 | `1` | Residual units per level. |" in plan
    assert "| `numbers` | `rounded`, `exact` | `rounded` |" in site_reference()


def test_links_within_the_reference_lead_to_its_sections(site: Path) -> None:
    for name in ("reference-plan", "reference-site"):
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        targets = set(re.findall(r'<td>.*?href="#([^"]+)"', text))
        assert targets
        assert targets <= _page(site / f"{name}.html").ids


def test_every_command_is_in_the_reference() -> None:
    text = command_reference()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.hidden or f"\n## semisam {name}" in f"\n{text}", name
    assert "| `--without-onnx` | Leave ONNX out. |" in text
    assert "run-in-process" not in text
