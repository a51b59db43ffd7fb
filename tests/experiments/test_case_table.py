"""Tables of cases as spreadsheets and people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.case_table import CaseRow, read_case_table
from semisam_core.errors import ConfigError

ROWS = [CaseRow("0007", "alpha", "train"), CaseRow("Müller", "alpha", "val"), CaseRow("c", "beta", "train")]
PLAIN = "case,site,split\n0007,alpha,train\nMüller,alpha,val\nc,beta,train\n"


def _read(folder: Path, content: bytes) -> list[CaseRow]:
    path = folder / "sites.csv"
    path.write_bytes(content)
    return read_case_table(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PLAIN.encode(), id="plain"),
        pytest.param(PLAIN.encode("utf-8-sig"), id="byte-order mark"),
        pytest.param(PLAIN.encode("utf-16"), id="UTF-16"),
        pytest.param(b"\xfe\xff" + PLAIN.encode("utf-16-be"), id="UTF-16, big-endian"),
        pytest.param(PLAIN.replace(",", ";").encode(), id="semicolons"),
        pytest.param(PLAIN.replace(",", "\t").encode(), id="tabs"),
        pytest.param(PLAIN.replace(",", ", ").encode(), id="spaces after commas"),
        pytest.param(PLAIN.replace(",", " , ").encode(), id="spaces around commas"),
        pytest.param(PLAIN.replace("case,site,split", "Case,SITE,Split").encode(), id="capitals in the header"),
        pytest.param(PLAIN.replace("train", "Train").encode(), id="capitals in a split"),
        pytest.param(PLAIN.replace("\n", "\r\n").encode(), id="Windows line ends"),
        pytest.param(PLAIN.replace("\n", "\r").encode(), id="old Mac line ends"),
        pytest.param((PLAIN + ",,\n\n,,\n").encode(), id="empty rows at the end"),
        pytest.param(("\n" + PLAIN).encode(), id="an empty first line"),
        pytest.param(PLAIN.replace("0007", '"0007"').encode(), id="quotes"),
        pytest.param(PLAIN.replace("Müller", "Mu\u0308ller").encode(), id="decomposed Unicode"),
        pytest.param(
            b"site;note, if any;case;split\nalpha;;0007;train\nalpha;a, b;M\xc3\xbcller;val\nbeta;;c;train\n",
            id="other columns, commas in cells",
        ),
    ],
)
def test_what_spreadsheets_write_is_read(content: bytes, tmp_path: Path) -> None:
    assert _read(tmp_path, content) == ROWS


def test_a_quoted_name_may_hold_the_delimiter(tmp_path: Path) -> None:
    assert _read(tmp_path, b'case,site,split\n"x,y",alpha,train\n') == [CaseRow("x,y", "alpha", "train")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (PLAIN.encode("latin-1"), "line 3: the text is not UTF-8. Save the table as UTF-8"),
        (PLAIN.encode("utf-16")[:-1], "the text is not UTF-16"),
        ("case,site,split\nx,alpha,train\n".encode("utf-16-le"), "null characters"),
        (b"", "the column case is missing"),
        (
            b"case,site\nx,alpha\n",
            "the column split is missing; the first line must name the columns case, site, split",
        ),
        (b"case,site,split,Case\nx,alpha,train,y\n", "the column case is there twice"),
        (b"case:site:split\nx:alpha:train\n", "Found: case:site:split"),
        (b"case,site,split\n", "has a header but no rows"),
        (b"case,site,split\nx,alpha,test\n", "line 2: split = 'test'; accepted: train, val"),
        (b"case,site,split\n\nx,alpha\n", "line 3: no value for split"),
        (b"case,site,split\nx,,train\n", "line 2: no value for site"),
        (b"case,site,split\nx,y,alpha,train\n", "line 2: 4 cells, but the header has 3. Quote a name"),
        (b"case,site,split\nx,alpha,train\nx,beta,val\n", r"line 3: the case x is listed twice \(first on line 2\)"),
        (b'case,site,split\n"x,alpha,train\n' + b"y" * 200_000, "not valid CSV"),
    ],
)
def test_anything_else_is_a_sentence_with_its_line(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^--table .*sites\.csv: .*{says}"):
        _read(tmp_path, content)


def test_a_table_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_case_table(tmp_path / "no.csv")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_case_table(tmp_path)
