"""The lead's page. It has no place for an image."""

from __future__ import annotations

TEMPLATE = """\
{% extends "frame" %}
{% from "parts" import counted, contents, table, numbers, key, lines, bars, pairs with context %}
{% block title %}Study {{ task }}{% endblock %}
{% block body %}
<header>
<h1>Study {{ task }}: {{ run }}</h1>
<p class="stays"><strong>Aggregates only.</strong> Made from what the sites sent: means, counts and weights. It holds no
scan, no picture and no score of a single case. &ldquo;withheld&rdquo; is a number that a site does not let leave, most
often since it is about too few patients; it is not zero.</p>
<p class="lead {{ worth.verdict.kind }}"><strong>{{ worth.verdict.sentence }}</strong></p>
{%- if state != "completed" %}
<p class="bad"><strong>This run has not completed ({{ state }}).{% if reason %} {{ reason }}{% endif %}</strong></p>
{%- endif %}
{{ counted(counts) }}
<p class="soft">{{ period }}. Scores: {{ scores_of }}.</p>
{{ contents(sections) }}
</header>
<main>

<section id="worth">
<h2>Was it worth it</h2>
<p>Each site alone (its own labels, the same steps) against the federated specialist, on the site's validation scans.
The worst site comes first. Brackets are 95 % intervals by a bootstrap over cases, given from {{ fewest }} cases on;
below about ten they are too narrow.{% if not has_intervals %} Here there are none: scores of single cases did not
leave the sites, or there are too few.{% endif %}</p>
{{ key([["a", "federated"], ["b", "alone"]] if has_alone else [["a", "federated"]]) }}
<div class="grid">
{%- for chart in worth.charts %}
{{ pairs(chart) }}
{%- endfor %}
</div>
{{ table("Alone and federated, worst first", worth_columns, worth.rows) }}
</section>

<section id="worst">
<h2>Worst first</h2>
{%- if worth.weakest %}
<ul>
{%- for each in worth.weakest %}
<li>{{ each }}</li>
{%- endfor %}
</ul>
{%- else %}
<p>Fewer than two sites sent scores, so none is the worst.</p>
{%- endif %}
<p>Which cases are worst is known at their sites only: there, <code>semisam site report</code> lists them with pictures,
the worst first.</p>
</section>

<section id="learning">
<h2>Learning curves</h2>
<p>Mean Dice over structures on the site's validation scans, by round. A round without a score is a gap.</p>
{{ key([["a", "federated"], ["b", "alone"]] if has_alone else [["a", "federated"]]) }}
<div class="grid">
{%- for chart in learning.charts %}
{{ lines(chart) }}
{%- endfor %}
</div>
{%- for site, why in learning.without %}
<p>{{ site }}: {{ why }}.</p>
{%- endfor %}
{{ numbers("Dice by round", learning.columns, learning.rows) }}
</section>

<section id="pseudo-labels">
<h2>Pseudo-labels</h2>
{%- if pseudo is none %}
<p>The plan makes none.</p>
{%- else %}
<p>Pairs of unlabeled scan and structure. A refused one (gated) teaches nothing.{% if buckets %} Counts in buckets are
drawn at their lowest.{% endif %} How reliable each source was, and how much it counted, stays at the sites:
<code>semisam site report</code>.</p>
{{ key([["a", "accepted"], ["b full", "refused"]]) }}
<div class="grid">
{%- for chart in pseudo.charts %}
{{ bars(chart) }}
{%- endfor %}
</div>
{%- for site, why in pseudo.without %}
<p>{{ site }}: {{ why }}.</p>
{%- endfor %}
{{ numbers("pseudo-labels by round", pseudo.columns, pseudo.rows) }}
{%- if hidden %}
{{ table("Scans whose labels the study never saw, scored afterwards on this machine", hidden_columns, hidden) }}
{%- endif %}
{%- endif %}
</section>

<section id="loss">
<h2>What each loss term taught</h2>
<p>Share of each weighted term in the norms of the gradients at the round's last step. A term with a tiny share teaches
nothing, whatever its loss is.</p>
{{ key([["a", "supervised (labels)"], ["b full", "consistency"], ["c", "generalist (pseudo-labels)"]]) }}
<div class="grid">
{%- for chart in loss.charts %}
{{ bars(chart) }}
{%- endfor %}
</div>
{%- for site, why in loss.without %}
<p>{{ site }}: {{ why }}.</p>
{%- endfor %}
{{ numbers("loss terms by round", loss.columns, loss.rows) }}
</section>

<section id="labels">
<h2>Labels used</h2>
{{ table("Scans by site, as the site last declared them", label_columns, labels) }}
<p>{{ scores_of }}.</p>
</section>

<section id="left">
<h2>What left each site</h2>
<p>{{ update_size }} Counted are replies that the server admitted, also those of rounds that were repeated after a
restart. What a site logged before it sent is in its own audit log.</p>
{{ table("What left each site", left_columns, left) }}
<details><summary>Names of all numbers that left</summary><p>{{ number_names | join(", ") }}</p></details>
</section>

<section id="privacy">
<h2>Privacy</h2>
{%- if not epsilons %}
<p>The plan does not train with differential privacy, so there is no epsilon.</p>
{%- endif %}
<dl>
{%- for name, value in privacy_terms %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl>
{%- if epsilons %}
{{ table("What private rounds cost the patients of each site", epsilon_columns, epsilons) }}
{%- endif %}
</section>

<section id="generalists">
<h2>Generalists and what they may have seen</h2>
<p>A generalist that was trained on the study's scans makes pseudo-labels that look better than on new ones. Below is
what its card says of its training data; whether the study's scans are among it only their sites can know.</p>
{%- for each in generalists %}
<h3>{{ each.name }} ({{ each.licence }})</h3>
{%- if each.likely %}
<p class="odd"><strong>Look at these first</strong>, they name what this study segments:
{{ each.likely | join("; ") }}.</p>
{%- endif %}
<p>May have seen: {{ each.overlaps | join("; ") or "no benchmark known" }}.</p>
<details><summary>Training data of {{ each.name }}</summary>
{%- for said in each.trained_on %}
<p>{{ said }}</p>
{%- endfor %}
</details>
{%- else %}
<p>None is used.</p>
{%- endfor %}
</section>

<section id="faults">
<h2>Faults and exclusions</h2>
{%- if faults %}
{{ table("What went wrong, and what was done about it", fault_columns, faults) }}
{%- else %}
<p>None was recorded.</p>
{%- endif %}
</section>

<section id="repeat">
<h2>How to repeat it</h2>
<dl>
{%- for name, value in repeat %}
<dt>{{ name }}</dt><dd><code>{{ value }}</code></dd>
{%- endfor %}
</dl>
<details><summary>The plan</summary>
<pre tabindex="0">{{ plan_text }}</pre>
</details>
</section>
</main>
{% endblock %}
"""
