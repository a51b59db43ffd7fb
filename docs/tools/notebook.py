"""A notebook's cells as Markdown, without what they printed."""

from __future__ import annotations

import json


def notebook_cells(text: str) -> str:
    """Return a notebook's text and code, cell by cell.

    Args:
        text: the notebook's file, JSON of nbformat 4.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(parts)
