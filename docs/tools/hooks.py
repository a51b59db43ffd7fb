"""What MkDocs does beyond its own work: it inserts generated text, and takes along files that pages link to.

On a page, a line `<!-- insert: NAME -->` is replaced by generated text, or by the file of that name in `docs/`. Whoever
reads the page in the repository does not see the line, so a link to the same text should stand beside it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools.commands import command_reference
from docs.tools.notebook import notebook_cells
from docs.tools.reference import plan_reference, site_reference

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository"  # where the site has the repository's files
INSERT = re.compile(r"^<!-- insert: (\S+) -->$", re.MULTILINE)
OUTWARD = re.compile(r"\]\((\.\./[^)#\s]+)")
GENERATED: Mapping[str, Callable[[], str]] = {
    "plan-keys": plan_reference,
    "site-keys": site_reference,
    "commands": command_reference,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files outside of the documentation that pages link to."""
    linked = {
        target
        for page in files.documentation_pages()
        for link in OUTWARD.findall(page.content_string)
        if (target := _outside(page.src_uri, link)) is not None
    }
    for target in sorted(linked):
        files.append(File.generated(config, f"{COPIES}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its insertions, and with links that stay in the site."""
    source = page.file.src_uri

    def inserted(match: re.Match[str]) -> str:
        name = match[1]
        return GENERATED[name]() if name in GENERATED else _contents(Path(config.docs_dir) / name)

    def inward(match: re.Match[str]) -> str:
        target = _outside(source, match[1])
        if target is None:
            return match[0]
        return f"]({posixpath.relpath(f'{COPIES}/{target}', posixpath.dirname(source) or '.')}"

    return INSERT.sub(inserted, OUTWARD.sub(inward, markdown))


def _outside(page: str, link: str) -> str | None:
    """Return the path, from the repository's root, of a link that leads out of the documentation; else None."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if target.startswith("docs/") else target


def _contents(path: Path) -> str:
    """Return a file as Markdown: a notebook's cells, or source code."""
    text = path.read_text(encoding="utf-8")
    return notebook_cells(text) if path.suffix == ".ipynb" else f"```python\n{text.rstrip()}\n```"
