"""What every report must be, whatever it shows: valid HTML that fetches nothing, with words for every figure."""

from __future__ import annotations

import itertools
import re
from xml.etree.ElementTree import Element

import html5lib

FETCHING = {"script", "link", "iframe", "object", "embed", "video", "audio", "source", "form", "base", "image", "use"}


def parsed(page: str) -> Element:
    """Return the page's tree; raises on anything that is not valid HTML."""
    parser = html5lib.HTMLParser(tree=html5lib.getTreeBuilder("etree"), strict=True, namespaceHTMLElements=False)
    found: Element = parser.parse(page)
    return found


def name_of(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def check_page(page: str) -> Element:
    """Check a page and return its tree."""
    tree = parsed(page)
    for element in tree.iter():
        if not isinstance(element.tag, str):
            continue
        name = name_of(element)
        assert name not in FETCHING, name
        for key, value in element.attrib.items():
            assert not key.lower().startswith("on"), (name, key)
            if key in ("src", "srcset", "href", "action", "{http://www.w3.org/1999/xlink}href"):
                assert value.startswith(("#", "data:image/png;base64,")), (name, key, value)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    check_words(tree)
    return tree


def check_words(tree: Element) -> None:
    """Check that figures have words, tables captions and headings, and that what scrolls can be reached by keyboard."""
    found = [element for element in tree.iter() if isinstance(element.tag, str)]
    figures = [each for each in found if name_of(each) == "figure"]
    assert figures
    for figure in figures:
        inside = {name_of(each): each for each in figure.iter()}
        assert "".join(inside["figcaption"].itertext()).strip()
        drawn = inside.get("svg", inside.get("img"))
        assert drawn is not None
        assert len(drawn.attrib.get("aria-label", drawn.attrib.get("alt", ""))) > 10
        assert name_of(drawn) == "img" or drawn.attrib["role"] == "img"
    for table in (each for each in found if name_of(each) == "table"):
        inside_names = [name_of(each) for each in table.iter()]
        assert "caption" in inside_names
        assert all("scope" in each.attrib for each in table.iter() if name_of(each) == "th")
    assert all(each.attrib.get("tabindex") == "0" for each in found if each.attrib.get("class") == "scroll")
    ids = {each.attrib["id"] for each in found if "id" in each.attrib}
    links = [each.attrib["href"][1:] for each in found if "href" in each.attrib]
    assert links
    assert set(links) <= ids
    levels = [int(name_of(each)[1]) for each in found if re.fullmatch("h[1-6]", name_of(each))]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def rows(tree: Element, caption: str) -> list[list[str]]:
    """Return the cells of the table with this caption, without its head."""
    for table in tree.iter("table"):
        said = table.find("caption")
        if said is not None and (said.text or "") == caption:
            body = table.find("tbody")
            assert body is not None
            return [["".join(cell.itertext()) for cell in row] for row in body]
    raise AssertionError(f"no table is called {caption!r}")


def text(tree: Element) -> str:
    """Return the words of the page, spaces and line breaks as one space."""
    return " ".join("".join(tree.itertext()).split())
