"""A site's fingerprint: from its scans to the few rounded numbers that may leave, through the gate like all else."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.egress import EgressError, EgressGate
from client.manifest import FINGERPRINT, manifest_of
from client.site_config import SiteConfig, annotated_classes, inventory
from semisam_core.contract import METRICS_RECORD, SITE_RECORD
from semisam_core.data.cases import Case, Role
from semisam_core.data.fingerprint import CaseFacts, fingerprint
from semisam_core.data.geometry import Geometry, axis_change
from semisam_core.data.nifti import check_memory, open_nifti
from semisam_core.data.scans import load_original_label, read_onto
from semisam_core.errors import CaseError
from semisam_core.files import write_json
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback

logger = logging.getLogger(__name__)

VERSION = 1
PERCENTILES = (0.5, 50, 99.5)


def said_of_patients(config: SiteConfig) -> str:
    """Return what a person should know where no manifest says whose each scan is."""
    return (
        f"{config.data.images}: no manifest of `semisam import` lies beside it, so every scan counts as a patient of "
        "its own. If patients have several scans, raise egress.minimum_patients."
    )


def write_fingerprint(
    config: SiteConfig, plan: Plan, out: Path, patients: Mapping[str, str], progress: ProgressCallback | None = None
) -> dict[str, object]:
    """Write the file that the hospital hands to the lead, and return its content.

    Scans for validation are not looked at: what they score must not have shaped the plan.

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
    cases = [case for case in inventory(config, plan).cases if case.role is not Role.VALIDATION]
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
    gate.agree(manifest_of(config, plan))
    known = dict.fromkeys(scalars, len({each.patient for each in facts}))
    reply = gate.reply(FINGERPRINT, "", 0, plan.hash, scalars, patients=known)
    content = {
        "version": VERSION,
        "site": reply[SITE_RECORD]["site"],
        "task": json.loads(plan.task.model_dump_json()),
        "fingerprint": dict(reply[METRICS_RECORD].items()),
    }
    write_json(out, content)
    return content


def _facts(case: Case, plan: Plan, config: SiteConfig, patient: str) -> CaseFacts:
    """Read one scan, a channel at a time.

    Raises:
        CaseError: it cannot be read, takes more memory than the site allows, or its files do not lie on one grid.
    """
    channels = [open_nifti(path, case.id, "image") for path in case.images]
    geometry = channels[0].geometry
    check_memory(case.id, [each.geometry for each in channels], None, config.storage.memory_gb)
    labeled: NDArray[np.bool_] | None = None
    volumes: dict[str, float] = {}
    if case.label is not None:
        label = load_original_label(case, plan)[0].numpy()
        classes = annotated_classes(config, plan)
        voxel_ml = float(np.prod(geometry.spacing_mm)) / 1000
        volumes = {plan.class_names[k - 1]: float((label == k).sum()) * voxel_ml for k in classes}
        labeled = np.isin(label, classes)
    whole, inside = [], []
    for channel in channels:
        voxels = read_onto(geometry, channel, "channel")
        finite = np.isfinite(voxels)
        if not finite.any():
            raise CaseError(f"{case.id}: the image has no finite voxel.")
        whole.append(np.percentile(voxels[finite], PERCENTILES))
        if labeled is not None and (finite & labeled).any():
            inside.append(np.percentile(voxels[finite & labeled], PERCENTILES))
    upright = _along_ras(geometry)
    foreground = np.array(inside, dtype=np.float64) if len(inside) == len(channels) else None
    return CaseFacts(
        patient, upright.spacing_mm, upright.extent_mm, np.array(whole, dtype=np.float64), volumes, foreground
    )


def _along_ras(geometry: Geometry) -> Geometry:
    return axis_change(geometry, Geometry(geometry.shape, torch.eye(4, dtype=torch.float64))).geometry(geometry)
