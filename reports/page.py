"""The frame of all reports: one HTML file that fetches nothing, on small screens and in the dark; no script runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from semisam_core.files import write_atomically
from semisam_core.text import printable

STYLE = """\
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --fill: #f3f5f7;
  --bad: #a40e26; --odd: #7d4e00; --good: #116329; --a: #1f5fa8; --b: #b04a00; --c: #6b7785; --grid: #e1e6eb; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #a0a9b4; --line: #3a424c;
  --fill: #1e2329; --bad: #ff8a94; --odd: #f0b84a; --good: #6cd08a; --a: #7fb0e6; --b: #ffa25c; --c: #98a3b0;
  --grid: #2a3139; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .2rem; }
a { color: inherit; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--a); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; }
p, li, dd { max-width: 70ch; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; }
.stays { border: 2px solid var(--line); padding: .6rem 1rem; max-width: none; }
.bad { color: var(--bad); } .odd { color: var(--odd); } .good { color: var(--good); }
.lead { font-size: 1.15rem; }
dl.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl.counts div { background: var(--fill); padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .875rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
dl.counts dd { font-size: 1.3rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; min-width: 4.5rem; }
thead th { vertical-align: bottom; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; background: #000; }
svg { display: block; width: 100%; max-width: 32rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg text.name { fill: var(--ink); }
.gridline { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke-width: 2; } .line.a { stroke: var(--a); }
.line.b { stroke: var(--b); stroke-dasharray: 5 4; }
.dot.a { fill: var(--a); } .dot.b { fill: var(--paper); stroke: var(--b); stroke-width: 2; }
.whisker.a { stroke: var(--a); stroke-width: 2; } .whisker.b { stroke: var(--b); stroke-width: 2; }
.link { stroke: var(--c); stroke-width: 1.5; }
.part { stroke: var(--paper); stroke-width: 1; }
.part.a { fill: var(--a); } .part.b { fill: var(--b); } .part.c { fill: var(--c); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; font-size: .875rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border: 2px solid; }
.key i.a { background: var(--a); border-color: var(--a); } .key i.b { border-color: var(--b); }
.key i.b.full { background: var(--b); } .key i.c { background: var(--c); border-color: var(--c); }
summary { cursor: pointer; margin: .5rem 0; } pre { background: var(--fill); padding: .6rem; overflow-x: auto; }
code { overflow-wrap: anywhere; }
@media print { figure { break-inside: avoid; } }
"""

FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'{% block sources %}{% endblock %}">
<meta name="referrer" content="no-referrer">
<title>{% block title %}{% endblock %}</title>
<style>
{{ style }}</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

PARTS = """\
{% macro counted(counts) %}
<dl class="counts">
{%- for name, value in counts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
{% endmacro %}

{% macro contents(sections) %}
<nav aria-label="Sections"><ul>
{%- for anchor, name in sections %}
<li><a href="#{{ anchor }}">{{ name }}</a></li>
{%- endfor %}
</ul></nav>
{% endmacro %}

{% macro table(caption, columns, rows) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}"><table>
<caption>{{ caption }}</caption>
<thead><tr>{% for each in columns %}<th scope="col">{{ each }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}

{% macro numbers(caption, columns, rows) %}
<details><summary>Numbers: {{ caption }}</summary>
{{ table(caption, columns, rows) }}
</details>
{% endmacro %}

{% macro key(entries) %}
<ul class="key">{% for style, words in entries %}<li><i class="{{ style }}"></i>{{ words }}</li>{% endfor %}</ul>
{% endmacro %}

{% macro axes(chart) %}
{%- for tick in chart.across %}
<line class="gridline" x1="{{ chart.left }}" x2="{{ chart.right }}" y1="{{ tick.at }}" y2="{{ tick.at }}"/>
<text x="{{ chart.left - 5 }}" y="{{ tick.at + 4 }}" text-anchor="end">{{ tick.words }}</text>
{%- endfor %}
{%- for tick in chart.along %}
<text x="{{ tick.at }}" y="{{ chart.bottom + 16 }}" text-anchor="middle">{{ tick.words }}</text>
{%- endfor %}
{% endmacro %}

{% macro lines(chart) %}
<figure><figcaption>{{ chart.title }}</figcaption>
<svg role="img" viewBox="0 0 {{ chart.width }} {{ chart.height }}" aria-label="{{ chart.alt }}">
{{- axes(chart) }}
{%- for line in chart.lines %}
{%- for piece in line.pieces %}
<polyline class="line {{ line.style }}"
 points="{% for x, y in piece %}{{ x }},{{ y }}{% if not loop.last %} {% endif %}{% endfor %}"/>
{%- for x, y in piece %}
<circle class="dot {{ line.style }}" cx="{{ x }}" cy="{{ y }}" r="3"/>
{%- endfor %}
{%- endfor %}
{%- endfor %}
</svg></figure>
{% endmacro %}

{% macro bars(chart) %}
<figure><figcaption>{{ chart.title }}</figcaption>
<svg role="img" viewBox="0 0 {{ chart.width }} {{ chart.height }}" aria-label="{{ chart.alt }}">
{{- axes(chart) }}
{%- for part in chart.parts %}
<rect class="part {{ part.style }}" x="{{ part.x }}" y="{{ part.y }}" width="{{ part.width }}"
 height="{{ part.height }}"/>
{%- endfor %}
</svg></figure>
{% endmacro %}

{% macro pairs(chart) %}
<figure><figcaption>{{ chart.title }}</figcaption>
<svg role="img" viewBox="0 0 {{ chart.width }} {{ chart.height }}" aria-label="{{ chart.alt }}">
{%- for tick in chart.ticks %}
<line class="gridline" x1="{{ tick.at }}" x2="{{ tick.at }}" y1="0" y2="{{ chart.bottom }}"/>
<text x="{{ tick.at }}" y="{{ chart.bottom + 16 }}" text-anchor="middle">{{ tick.words }}</text>
{%- endfor %}
{%- for row in chart.rows %}
<text class="name" x="{{ chart.left }}" y="{{ row.y - 9 }}">{{ row.name }}</text>
{%- if row.marks | length == 2 %}
<line class="link" x1="{{ row.marks[0].x }}" x2="{{ row.marks[1].x }}" y1="{{ row.y }}" y2="{{ row.y }}"/>
{%- endif %}
{%- for mark in row.marks %}
{%- if mark.low is not none %}
<line class="whisker {{ mark.style }}" x1="{{ mark.low }}" x2="{{ mark.high }}" y1="{{ mark.y }}" y2="{{ mark.y }}"/>
{%- endif %}
<circle class="dot {{ mark.style }}" cx="{{ mark.x }}" cy="{{ row.y }}" r="5"/>
{%- endfor %}
{%- endfor %}
</svg></figure>
{% endmacro %}
"""


def render(template: str, **content: Any) -> str:
    """Return a page. Every value is escaped; text that could reorder or hide what is shown is spelled out.

    Args:
        template: extends `frame` and may import `parts`; by the same content it gives the same bytes.
        content: what it shows.
    """
    loader = DictLoader({"frame": FRAME, "parts": PARTS, "page": template})
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_shown)
    environment.globals["style"] = environment.filters["safe"](STYLE)
    page: str = environment.get_template("page").render(**content)
    return page


def write_page(path: Path, page: str, mode: int) -> Path:
    """Write a page, atomically, and return its path.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    write_atomically(path, page.encode(), mode)
    return path


def count_words(count: int, thing: str) -> str:
    """Return `1 site`, `3 sites`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def listed(entries: Mapping[str, int]) -> str:
    """Return counted words: `empty 3, too-small 1`; `-` for none."""
    return ", ".join(f"{name} {count}" for name, count in entries.items()) or "-"


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value
