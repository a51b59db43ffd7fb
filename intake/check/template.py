"""The report's page. Every value is escaped; nothing is fetched, and no script runs."""

from __future__ import annotations

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="referrer" content="no-referrer">
<title>Data check of {{ site }}</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --fill: #f3f5f7;
  --bad: #a40e26; --odd: #7d4e00; --good: #116329; --bar: #3b6ea8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #a0a9b4; --line: #3a424c;
  --fill: #1e2329; --bad: #ff8a94; --odd: #f0b84a; --good: #6cd08a; --bar: #7fb0e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .2rem; }
a { color: inherit; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; text-align: left; }
.stays { border: 2px solid var(--line); padding: .6rem 1rem; }
.problem { color: var(--bad); } .warning { color: var(--odd); } .fine { color: var(--good); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl div { background: var(--fill); padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .875rem; } dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; }
thead th { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; background: #000; image-rendering: auto; }
svg { display: block; width: 100%; height: auto; }
.bar { fill: var(--bar); } svg text { fill: var(--soft); font-size: 12px; }
.key span { white-space: nowrap; margin-right: 1rem; } .key i { display: inline-block; width: .8rem; height: .8rem; }
ul { padding-left: 1.2rem; }
@media print { .grid figure, section > ul > li { break-inside: avoid; } }
</style>
</head>
<body>
<h1>Data check of {{ site }}</h1>
<p class="stays"><strong>This report stays at the site.</strong> It names files and shows scans of patients. Do not send
it to the lead of a study or to anyone who may not see them; nothing in FedSemiSAM sends it.</p>
<p class="{{ verdict.kind }}"><strong>{{ verdict.sentence }}</strong></p>
<dl>
{%- for name, value in counts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{%- endfor %}
</dl>
<p class="soft">{{ basis }}</p>

<main>
<section>
<h2>Findings</h2>
{%- for group in groups %}
<h3><span class="{{ group.severity }}">{{ group.severity }}</span>: {{ group.check }}</h3>
<div class="soft">Accepted: {{ group.accepted }}.</div>
<ul>
{%- for finding in group.findings %}
<li>{% if finding.case %}{% if finding.row is not none %}<a href="#case-{{ finding.row }}">{{ finding.case }}</a>
{%- else %}{{ finding.case }}{% endif %}: {% endif %}{{ finding.sentence }}</li>
{%- endfor %}
</ul>
{%- else %}
<p class="fine">None.</p>
{%- endfor %}
</section>

<section>
<h2>Checks</h2>
<p>Done: {{ done | join(", ") }}.</p>
{%- if not_done %}
<p>Not done:</p>
<ul>
{%- for reason, names in not_done %}
<li>{{ names | join(", ") }}: {{ reason }}.</li>
{%- endfor %}
</ul>
{%- endif %}
</section>

{%- if charts %}
<section>
<h2>Distributions</h2>
<div class="grid">
{%- for chart in charts %}
<figure><figcaption>{{ chart.title }} ({{ chart.values }} cases)</figcaption>
<svg role="img" viewBox="0 0 {{ width }} {{ height + 34 }}"
 aria-label="Histogram: {{ chart.title }}, {{ chart.values }} cases
 from {{ chart.low | number }} to {{ chart.high | number }} {{ chart.unit }}">
{%- for bar in chart.bars %}
<rect class="bar" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}">
<title>{{ bar.count }}</title></rect>
{%- endfor %}
<text x="0" y="{{ height + 15 }}">{{ chart.low | number }}</text>
{%- if chart.bars | length > 1 %}
<text x="{{ width }}" y="{{ height + 15 }}" text-anchor="end">{{ chart.high | number }}</text>
{%- endif %}
<text x="{{ width / 2 }}" y="{{ height + 30 }}" text-anchor="middle">{{ chart.unit }}</text>
</svg></figure>
{%- endfor %}
</div>
</section>
{%- endif %}

{%- if classes %}
<section>
<h2>Structures</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Structures"><table>
<caption>What the labels mark, over {{ labels }} labels.</caption>
<thead><tr><th scope="col">Structure</th><th scope="col">Labels</th><th scope="col">Median ml</th>
<th scope="col">Smallest to largest ml</th></tr></thead>
<tbody>
{%- for each in classes %}
<tr><th scope="row">{{ each.name }}</th><td>{{ each.count }}</td><td>{{ each.median | number }}</td>
<td>{{ each.low | number }} to {{ each.high | number }}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>
{%- endif %}

<section>
<h2>Cases</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Cases"><table>
<caption>Shape and voxel size along the axes of the file. Intensities: 0.5th, 50th and 99.5th percentile.</caption>
<thead><tr><th scope="col">Case</th><th scope="col">Role</th><th scope="col">Shape</th><th scope="col">Voxels (mm)</th>
<th scope="col">Axes</th>
<th scope="col">Intensities</th><th scope="col">Structures (ml)</th><th scope="col">Findings</th>
</tr></thead>
<tbody>
{%- for row in rows %}
<tr id="case-{{ row.number }}"><th scope="row">{{ row.case }}</th><td>{{ row.role }}</td><td>{{ row.shape }}</td>
<td>{{ row.spacing }}</td><td>{{ row.axes }}</td>
<td>{% for line in row.intensities %}{{ line }}{% if not loop.last %}<br>{% endif %}{% endfor %}</td>
<td>{{ row.structures | join(", ") }}</td>
<td>{% if row.problems %}<span class="problem">{{ row.problems | join(", ") }}</span>
{% endif %}{% if row.warnings %}<span class="warning">{{ row.warnings | join(", ") }}</span>{% endif %}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>

{%- if pictures %}
<section>
<h2>Pictures</h2>
<p class="soft">Axial, coronal and sagittal plane through the label's centre, or the volume's; the patient's right is on
the left.{% if pictures_left_out %} {{ pictures_left_out }} cases have no picture here.{% endif %}</p>
<p class="key">
{%- for name, colour in key %}<span><i style="background: {{ colour }}"></i> {{ name }}</span>{% endfor %}</p>
<div class="grid">
{%- for picture in pictures %}
<figure><img src="data:image/png;base64,{{ picture.png }}" alt="{{ picture.alt }}"
 width="288" height="96" loading="lazy">
<figcaption>{{ picture.case }}, {{ picture.role }}</figcaption></figure>
{%- endfor %}
</div>
</section>
{%- endif %}
</main>
</body>
</html>
"""
