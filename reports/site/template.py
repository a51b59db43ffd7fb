"""The site's page. Its pictures are part of the file."""

from __future__ import annotations

TEMPLATE = """\
{% extends "frame" %}
{% from "parts" import counted, contents, table, numbers, key, lines, bars with context %}
{% block sources %}; img-src data:{% endblock %}
{% block title %}{{ site }}: {{ run }}{% endblock %}
{% block body %}
<header>
<h1>Site {{ site }}, run {{ run }}</h1>
<p class="stays"><strong>This report stays at the site.</strong> It names cases and shows scans of patients. Do not send
it to the lead of a study or to anyone who may not see them; nothing in FedSemiSAM sends it.</p>
{{ counted(counts) }}
{{ contents(sections) }}
</header>
<main>

<section id="scores">
<h2>Scores</h2>
{%- if scored_round is none %}
<p>No specialist of this run has been scored here.</p>
{%- else %}
<p>Validation scans of this site, after round {{ scored_round }}. Brackets are 95 % intervals by a bootstrap over cases,
given from {{ fewest }} cases on; below about ten they are too narrow.</p>
{{ table("Means over cases", mean_columns, means) }}
{{ table("Single cases, worst first", case_columns, cases) }}
{%- endif %}
</section>

<section id="pictures">
<h2>Pictures</h2>
<p>Axial, coronal and sagittal plane through the middle of the label, or of the pseudo-label or prediction where there
is none; the patient's right is on the left. Prediction: {{ prediction_of }}.
{%- if viewer %} The same scans <a href="{{ viewer }}">in three dimensions</a>.{% endif %}</p>
<ul class="key">
{%- for name, colour in colours %}
<li><i style="background: {{ colour }}; border-color: {{ colour }}"></i>{{ name }}</li>
{%- endfor %}
</ul>
{%- for each in pictures %}
<h3>{{ each.case }} ({{ each.role }}): {{ each.why }}</h3>
<div class="grid">
{%- for view in each.views %}
{%- if view.png is none %}
<p><strong>{{ view.title }}</strong>: {{ view.words }}.</p>
{%- else %}
<figure><figcaption>{{ view.title }}</figcaption>
<img src="data:image/png;base64,{{ view.png }}" alt="{{ view.words }}" width="{{ 3 * side }}" height="{{ side }}"
 loading="lazy"></figure>
{%- endif %}
{%- endfor %}
</div>
{%- else %}
<p>There is no scan to show yet.</p>
{%- endfor %}
</section>

<section id="learning">
<h2>Learning curves</h2>
<p>Mean Dice over this site's validation scans, by round.</p>
<div class="grid">
{%- for chart in learning.charts %}
{{ lines(chart) }}
{%- endfor %}
</div>
{{ numbers("Dice by round", learning_columns, learning.rows) }}
</section>

<section id="pseudo-labels">
<h2>Pseudo-labels</h2>
{%- if not gates.rows %}
<p>None was made.</p>
{%- else %}
<p>Unlabeled scans whose pseudo-label was accepted or refused (gated), by round.</p>
{{ key([["a", "accepted"], ["b full", "refused"]]) }}
<div class="grid">
{%- for chart in gates.charts %}
{{ bars(chart) }}
{%- endfor %}
</div>
{{ numbers("pseudo-labels by round", gate_columns, gates.rows) }}
{%- endif %}
</section>

<section id="sources">
<h2>Sources of pseudo-labels</h2>
{%- if not sources.rows %}
<p>None was asked.</p>
{%- else %}
<p>How much each source counted in the rounds that made pseudo-labels anew, and its reliability: its Dice on this site's
labeled scans, each without having learned from the scan it is scored on. A source that cannot be scored so counts like
the mean of the others.</p>
{{ key([["a", "share"], ["b", "reliability"]]) }}
<div class="grid">
{%- for chart in sources.charts %}
{{ lines(chart) }}
{%- endfor %}
</div>
{{ numbers("sources by round", source_columns, sources.rows) }}
{%- endif %}
</section>

<section id="quarantine">
<h2>Scans that could not be used</h2>
{%- if quarantine %}
{{ table("Scans that could not be used", ["case", "why"], quarantine) }}
{%- else %}
<p>None.</p>
{%- endif %}
</section>

<section id="left">
<h2>What left this site</h2>
<p>{{ left_in_total }} From the audit log; <code>semisam site audit verify</code> checks that it is whole.</p>
{{ numbers("what left, message by message", left_columns, left) }}
</section>

<section id="privacy">
<h2>Privacy</h2>
{%- if privacy is none %}
<p>The plan does not train with differential privacy, so there is no epsilon.</p>
{%- else %}
<p>Spent by this site's patients over all studies: epsilon {{ privacy.total }} at delta {{ privacy.delta }}; this site's
limit is {{ privacy.limit }}.</p>
{{ table("Private rounds of this run", epsilon_columns, epsilons) }}
{%- endif %}
</section>

<section id="repeat">
<h2>Which run this was</h2>
<dl>
<dt>plan hash</dt><dd><code>{{ plan_hash }}</code></dd>
<dt>seed</dt><dd><code>{{ seed }}</code></dd>
<dt>this page made by</dt><dd><code>fedsemisam {{ version }}</code></dd>
</dl>
</section>
</main>
{% endblock %}
"""
