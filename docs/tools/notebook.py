"""A notebook's cells as Markdown, without what they printed."""

from __future__ import annotations

import json
import re


def notebook_cells(text: str) -> str:
    """Return a notebook's text and code, cell by cell; its headings become those of a page's third level.

    Args:
        text: the notebook's file, JSON of nbformat 4.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        text_of_page = re.sub(r"^#+ ", "### ", source, flags=re.MULTILINE)
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else text_of_page)
    return "\n\n".join(parts)
