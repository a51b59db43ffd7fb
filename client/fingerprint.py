"""A site's fingerprint: from its scans to the few rounded numbers that may leave, through the gate like all else."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from client.egress import EgressError, EgressGate
from client.site_config import SiteConfig, annotated_classes, inventory
from semisam_core.contract import METRICS_RECORD
from semisam_core.data.cases import Case
from semisam_core.data.fingerprint import CaseFacts, fingerprint, fingerprint_scalars
from semisam_core.data.geometry import Geometry, axis_change
from semisam_core.data.nifti import open_nifti
from semisam_core.data.scans import load_original_label
from semisam_core.errors import CaseError
from semisam_core.files import write_json
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback

logger = logging.getLogger(__name__)

VERSION = 1


def write_fingerprint(
    config: SiteConfig, plan: Plan, out: Path, patients: Mapping[str, str], progress: ProgressCallback | None = None
) -> dict[str, object]:
    """Write the file that the hospital hands to the lead, and return its content.

    Args:
        config: the site's YAML.
        plan: a draft, of which only the task matters.
        out: the file.
        patients: case -> patient, as far as known; every other case counts as a patient of its own.
        progress: called with (cases read, cases).

    Raises:
        EgressError: the site's YAML does not let fingerprints leave.
        ConfigError: folders or lists in the YAML are invalid.
        OSError: the audit log cannot be written; then nothing is.
    """
    if not config.egress.fingerprint:
        raise EgressError(f"site {config.site}: egress.fingerprint is false; no fingerprint may leave.")
    cases = inventory(config, plan).cases
    facts = []
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases))
        try:
            facts.append(_facts(case, plan, config, patients.get(case.id, case.id)))
        except CaseError as error:
            logger.warning("A case is left out of the fingerprint: %s", error)
    if progress:
        progress(len(cases), len(cases))
    scalars = fingerprint(facts, plan.task, config.egress.minimum_patients)
    gate = EgressGate(config.site, config.egress, config.storage.folder / "audit.jsonl")
    reply = gate.reply("fingerprint", "", 0, "", scalars, fingerprint_scalars(plan.task))
    content = {
        "version": VERSION,
        "site": config.site,
        "task": json.loads(plan.task.model_dump_json()),
        "fingerprint": dict(reply[METRICS_RECORD].items()),
    }
    write_json(out, content)
    return content


def _facts(case: Case, plan: Plan, config: SiteConfig, patient: str) -> CaseFacts:
    """Read one scan, a channel at a time.

    Raises:
        CaseError: it cannot be read.
    """
    label, geometry = None, None
    if case.label is not None:
        label, geometry = load_original_label(case, plan)
    intensities = []
    for path in case.images:
        volume = open_nifti(path, case.id, "image")
        geometry = geometry or volume.geometry
        voxels = volume.voxels()
        inside = voxels[label.numpy() > 0] if label is not None and voxels.shape == tuple(label.shape) else voxels
        finite = inside[np.isfinite(inside)]
        if not finite.size:
            finite = voxels[np.isfinite(voxels)]
        if not finite.size:
            raise CaseError(f"{case.id}: the image has no finite voxel.")
        intensities.append(np.percentile(finite, [0.5, 50, 99.5]))
    assert geometry is not None
    upright = _along_ras(geometry)
    volumes = {}
    if label is not None:
        voxel_ml = float(np.prod(geometry.spacing_mm)) / 1000
        volumes = {
            plan.class_names[k - 1]: float((label == k).sum()) * voxel_ml for k in annotated_classes(config, plan)
        }
    return CaseFacts(patient, upright.spacing_mm, upright.extent_mm, np.array(intensities), volumes)


def _along_ras(geometry: Geometry) -> Geometry:
    import torch

    return axis_change(geometry, Geometry(geometry.shape, torch.eye(4, dtype=torch.float64))).geometry(geometry)
