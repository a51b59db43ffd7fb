"""The scans of a site's report in three dimensions: NiiVue and the volumes in one HTML file, without a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from numpy.typing import NDArray

from reports.page import render
from semisam_core.data.geometry import Geometry
from semisam_core.reporting.overview import COLOURS
from semisam_core.text import printable

MOST_VOXELS = 16_000_000  # of one volume: what a browser holds several of, on the GPU too
_FOLDER = Path(__file__).parent
_TEMPLATE = """\
{% extends "frame" %}
{% block sources %}; script-src {% for each in hashes %}'sha256-{{ each }}' {% endfor %}; img-src data: blob:; \
connect-src data: blob:{% endblock %}
{% block title %}{{ site }}: {{ run }}, scans{% endblock %}
{% block body %}
<header>
<h1>Site {{ site }}, run {{ run }}</h1>
<p class="stays"><strong>This page stays at the site.</strong> It holds scans of patients. Do not send it to the lead of
a study or to anyone who may not see them; nothing in FedSemiSAM sends it.</p>
</header>
<main>
<p><label>Scan <select id="case"></select></label> <label>View <select id="view"></select></label></p>
<div style="height: 65vh; min-height: 20rem"><canvas id="volume" tabindex="0"
 aria-label="The chosen scan and what is drawn on it: in three planes and as a volume"></canvas></div>
<p id="state" role="status"></p>
<p id="layers" role="group" aria-label="Opacity"></p>
<p class="soft">Drag to move the crosshair or turn the volume, scroll to go through slices. The
patient's right is on the left. On the grid of the plan
{%- if stride > 1 %}, large scans thinned, at most to one voxel in {{ stride }} along each axis{% endif %}.
Structures: {% for name, colour in colours %}<span style="color: {{ colour }}">■</span> {{ name }} {% endfor %}</p>
</main>
<script type="application/json" id="colours">{{ rgb }}</script>
<script type="application/json" id="cases">{{ cases }}</script>
<script>{{ scripts[0]|safe }}</script>
<script>{{ scripts[1]|safe }}</script>
{% endblock %}
"""


@dataclass(frozen=True)
class Layer:
    """A volume to look at.

    Attributes:
        name: what it is.
        kind: scan, structures or uncertainty.
        nifti: base64 of a compressed NIfTI file.
        stride: every how many voxels along each axis are kept.
        shown: whether it is visible at first.
    """

    name: str
    kind: str
    nifti: str
    stride: int
    shown: bool


def layer(name: str, kind: str, volume: NDArray[np.generic], grid: Geometry, shown: bool) -> Layer:
    """Pack a volume (H, W, D) on a grid; one of more than `MOST_VOXELS` is thinned."""
    stride = max(1, math.ceil((volume.size / MOST_VOXELS) ** (1 / 3)))
    affine = grid.affine.numpy() @ np.diag([stride, stride, stride, 1.0])
    kept = np.ascontiguousarray(volume[::stride, ::stride, ::stride])
    file = gzip.compress(nib.Nifti1Image(kept, affine).to_bytes(), 6, mtime=0)
    return Layer(name, kind, base64.b64encode(file).decode(), stride, shown)


def viewer_page(site: str, run: str, classes: Sequence[str], cases: Sequence[tuple[str, Sequence[Layer]]]) -> str:
    """Return the page.

    Args:
        site: the site's name.
        run: the run's name.
        classes: names of the structures.
        cases: what each scan is called, and its volumes, the scan itself first.
    """
    scripts = [(_FOLDER / name).read_text(encoding="utf-8") for name in ("niivue.umd.js", "viewer.js")]
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(classes))]
    content = [{"name": printable(name), "layers": [asdict(each) for each in layers]} for name, layers in cases]
    return render(
        _TEMPLATE,
        site=site,
        run=run,
        colours=list(zip(classes, colours, strict=True)),
        stride=max((each.stride for _, layers in cases for each in layers), default=1),
        rgb=htmlsafe_json_dumps([[int(each[k : k + 2], 16) for k in (1, 3, 5)] for each in colours]),
        cases=htmlsafe_json_dumps(content, dumps=json.dumps),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts],
    )
