"""The commented YAML of one site, to be filled in with `str.format`; every value is a YAML value already."""

from __future__ import annotations

import re
from pathlib import Path

from semisam_core.configuration import flow_yaml, is_name
from semisam_core.files import write_atomically

LEDGER = "~/.local/share/semisam/privacy"  # the user's, not the study's: what was spent outlives both

TEMPLATE = """\
# One hospital of a study. This file stays at the site; nothing in it is ever sent but the site's name.
version: 1

# Lowercase letters, digits and dashes. Appears in the server's record.
site: {site}

data:
  # Folders of NIfTI files. An image and its label have one name. Relative paths count from this file's folder.
  images: {images}
  labels: {labels}
  # Cases whose expert labels are trained on, or `all` that have a label. Every other train case is unlabeled: its
  # label, if it has one, is never read.
  labeled: [{labeled}]
  # Cases whose labels are for scoring only.
  validation: [{validation}]
  # In place of the two lists: a split by patient, such as {{validation_share: 0.2, labeled_patients: 4, seed: 0}}, with
  # a number of patients or `all`. All scans of a patient fall on one side, by the manifest.json that `semisam import`
  # writes beside images/ (without one, each case is its own patient). Patients added later move nobody. A run keeps to
  # the split and to the cases that it began with. null: the lists.
  split: {split}
  # Cases never to touch.
  excluded: [{excluded}]
  # Classes of the plan that the label files mark: all, or a list of names. A voxel without a label may then be any
  # class that is not named; training leaves that open, and scores are of the named classes only.
  labeled_classes: all
  # Whether labels that came of `semisam review` here are trained on, from the next round on.
  reviewed: true

# Frozen foundation models at this site: `packaged` weights, or a file with its SHA-256.
generalists: {generalists}

# auto takes a GPU where there is one; or cpu, cuda, cuda:1.
device: auto
# CPU threads; leave out to take all.
threads: 1

storage:
  # The site's own state: teacher, pseudo-labels, embeddings, prepared scans, audit log.
  folder: {storage}
  # Disk for stored embeddings (about 0.65 MB a slice with LiteMedSAM); what does not fit is computed again.
  embeddings_gb: 10.0
  # Memory for prepared scans and for the work on one. A scan that needs more by its header, itself or for its
  # pseudo-label, is quarantined. Beside it, networks take their own, and blocks and libraries about 0.3 GB.
  memory_gb: 4.0

# Limits on what may leave. A plan cannot loosen them.
egress:
  maximum_update_mb: 500.0
  # Means over validation cases that may leave; [] sends none.
  validation_scores: [dice, jaccard, hd95_mm, asd_mm, surface_dice, cases, missing_distances]
  # Whether a plan's feature head may be trained on this site's labels; if not, it is sent back as it came. With it goes
  # the mean volume of each labeled structure: with one labeled scan, that of one patient.
  feature_head: true
  # rounded: counts of scans leave as 0, 1-4, 5-9, 10-19, 20-49, ..., all other numbers with few significant digits, and
  # scores and losses about fewer patients than minimum_patients not at all. exact: every number as it is; only for data
  # that is public or generated.
  numbers: {numbers}
  significant_digits: 2
  # Whether `semisam site fingerprint` may write rounded aggregates over patients (spacing, extent, intensities,
  # volumes) for the lead to derive the plan from.
  fingerprint: true
  # The number of patients below which a number about them is withheld, in a fingerprint and in every reply.
  minimum_patients: 5
  # Whether the epsilon that each private round costs, and the total of its patients, is sent with the update.
  epsilon: false

# What may be spent of the patients' privacy, over all studies. A plan cannot loosen it; docs/privacy.md explains.
privacy:
  # true refuses plans without a privacy section.
  required: false
  # A round after which its patients would have spent more than this epsilon is refused before it starts.
  maximum_epsilon: 10.0
  # Plans with a smaller noise multiplier or a larger delta are refused.
  minimum_noise: 0.3
  maximum_delta: 1.0e-5
  # Folder of the ledger of what was spent. It must outlive this study and this installation, so keep it outside of both
  # and back it up; all studies on the same patients must name the same one. null: a folder in the storage.
  ledger: {ledger}
  # secure: noise from the operating system's cryptographic generator. seeded: a simulation repeats bit by bit and
  # protects nobody; a deployed site refuses it.
  noise: secure
"""


def write_for_import(folder: Path, labels: bool) -> tuple[Path, bool]:
    """Write `site.yaml` into a folder that `semisam import` has filled, unless there is one.

    Args:
        folder: with `images`, and if there are any `labels`.
        labels: whether any scan has a label; patients are then divided, a fifth for validation.

    Returns:
        The file, and whether it was written.
    """
    path = folder / "site.yaml"
    if path.exists():
        return path, False
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    content = TEMPLATE.format(
        site=flow_yaml(name if is_name(name) else "site"),
        images="images",
        labels="labels" if labels else "null",
        labeled="",
        validation="",
        excluded="",
        split="{validation_share: 0.2, labeled_patients: all, seed: 0}" if labels else "null",
        generalists="{lite-medsam: {weights: packaged}}",
        storage="storage",
        numbers="rounded",
        ledger=LEDGER,
    )
    write_atomically(path, content.encode())
    return path, True
