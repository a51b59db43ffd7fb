"""Checks of a site's data, models and machine against the plan."""

from __future__ import annotations

import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch

from client.site_config import SiteConfig, annotated_classes, inventory, usable_generalists
from deployment.site.findings import Finding, fine, problem, warning
from intake.check.plausibility import (
    EMPTY_LABEL,
    NO_ORIENTATION,
    ONE_VALUE,
    has_orientation,
    implausible_spacing,
    missing_classes,
)
from semisam_core.data.cases import Case, Inventory, Role
from semisam_core.data.scans import Scan, load_scan
from semisam_core.errors import CaseError, ConfigError, WeightsError
from semisam_core.generalists import generalist_spec
from semisam_core.generalists.weights import verified_sha256
from semisam_core.plan import Plan
from semisam_core.progress import ProgressCallback
from semisam_core.specialists import memory_estimate

BUSY_SHARE = 0.7


@dataclass
class _Seen:
    """Totals over all cases."""

    usable: int = 0
    bytes: int = 0
    voxels_unlabeled: int = 0
    voxels_largest: int = 0
    classes: set[int] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def check_data(config: SiteConfig, plan: Plan, read: bool, progress: ProgressCallback) -> list[Finding]:
    """Find all cases and read every one as a round would.

    Args:
        config: the site's YAML.
        plan: the study plan.
        read: whether to read scans; otherwise they are only listed.
        progress: called with (cases read, cases).
    """
    try:
        found = inventory(config, plan)
    except ConfigError as error:
        return [problem("data", f"{error} Correct data in site.yaml.")]
    counts = ", ".join(f"{len(found.of(role))} {role.value}" for role in Role)
    findings = [fine("data", f"found {counts}.")]
    findings += [warning(f"case {q.id}", f"{q.reason}. It is left out.") for q in found.quarantined]
    if not found.of(Role.LABELED):
        findings.append(warning("data", "no case is labeled; if experts drew any, list them under data.labeled."))
    if not read:
        return [*findings, warning("data", "no scan was read (--no-data), so their content was not checked.")]
    seen = _read_all(found, plan, config.storage.memory_gb, progress)
    if not seen.usable:
        findings.append(problem("data", "no case can be used; the reasons are below."))
    return [*findings, *seen.findings, *_check_classes(config, plan, found, seen), *_check_disk(config, plan, seen)]


def check_generalists(config: SiteConfig, plan: Plan) -> list[Finding]:
    """Check that the plan's frozen models are here and have the right hashes."""
    if plan.pseudo_labels is None:
        return [fine("generalists", "the plan uses none.")]
    usable = usable_generalists(config, plan)
    findings = []
    for name in plan.pseudo_labels.generalists:
        subject = f"generalist {name}"
        spec = generalist_spec(name)
        published = f"published as {spec.card.source}, licence {spec.card.licence}"
        if name not in usable:
            findings.append(warning(subject, f"not under generalists in site.yaml, so it is skipped; {published}."))
            continue
        entry = config.generalists[name]
        if not spec.installed:
            findings.append(problem(subject, f"needs the package {spec.module}; install fedsemisam[{spec.extra}]."))
        elif entry.weights == "packaged":
            known = fine(subject, "its weights come with its package.")
            missing = problem(subject, f"no package ships its weights; name a file and its sha256. {published}.")
            findings.append(known if spec.packaged else missing)
        else:
            findings.append(_check_weights(subject, Path(entry.weights), entry.sha256, published))
    return findings


def check_machine(config: SiteConfig, plan: Plan) -> list[Finding]:
    """Check that the device exists and has enough memory for a training step."""
    try:
        device = config.torch_device()
    except ConfigError as error:
        return [problem("device", str(error))]
    training = plan.training
    labeled, unlabeled = training.labeled_batch, training.unlabeled_batch
    if plan.privacy is not None:  # one patient at a time
        labeled = unlabeled = plan.privacy.patches_per_patient
    batch = labeled + (unlabeled if plan.uses_unlabeled else 0)
    channels, classes = len(plan.task.channels), len(plan.class_names)
    chosen = plan.specialist
    needed = memory_estimate(chosen.name, chosen.arguments, channels, classes, plan.data.patch, batch)
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    else:
        free = int(psutil.virtual_memory().available - config.storage.memory_gb * 1e9)
    said = f"{device}: a training step takes about {needed / 2**30:.1f} GiB, {max(free, 0) / 2**30:.1f} GiB are free"
    if needed > free:
        return [problem("memory", f"{said}. Free some, use another device, or lower storage.memory_gb.")]
    if needed > BUSY_SHARE * free:
        return [warning("memory", f"{said}, which is tight. Run nothing else on this machine.")]
    return [fine("memory", f"{said}.")]


def check_storage(folder: Path) -> Finding:
    """Check that no other user can read the storage, which holds prepared scans."""
    if not folder.exists():
        return fine("storage", f"{folder} does not exist yet; only its owner will be able to read it.")
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        return warning("storage", f"other users can read {folder}, which holds scans; chmod 700 {folder}")
    return fine("storage", f"only its owner can read {folder}.")


def _read_all(found: Inventory, plan: Plan, memory_gb: float, progress: ProgressCallback) -> _Seen:
    seen = _Seen()
    for done, case in enumerate(found.cases):
        progress(done, len(found.cases))
        try:
            scan = load_scan(case, plan, memory_gb=memory_gb)
        except CaseError as error:
            seen.findings.append(warning(f"case {case.id}", f"{error} It is left out until this is corrected."))
            continue
        seen.usable += 1
        seen.bytes += scan.image.nbytes + (scan.label.nbytes if scan.label is not None else 0)
        seen.voxels_unlabeled += scan.image[0].numel() if case.role is Role.UNLABELED else 0
        seen.voxels_largest = max(seen.voxels_largest, scan.image[0].numel())
        seen.findings += _check_case(case, scan)
        if scan.label is not None:
            seen.classes |= {int(value) for value in np.unique(scan.label.numpy())} - {0}
    progress(len(found.cases), len(found.cases))
    return seen


def _check_case(case: Case, scan: Scan) -> list[Finding]:
    subject = f"case {case.id}"
    sentences = [f"{note}." for note in scan.notes]
    if not has_orientation(nib.load(case.images[0]).header):
        sentences.append(NO_ORIENTATION)
    if (implausible := implausible_spacing(scan.original.spacing_mm)) is not None:
        sentences.append(implausible)
    if float(scan.image.std()) == 0.0:
        sentences.append(ONE_VALUE)
    if scan.label is not None and not bool(scan.label.any()):
        sentences.append(EMPTY_LABEL)
    return [warning(subject, sentence) for sentence in sentences]


def _check_classes(config: SiteConfig, plan: Plan, found: Inventory, seen: _Seen) -> list[Finding]:
    if not any(case.label is not None for case in found.cases):
        return []
    missing = missing_classes(plan.class_names, annotated_classes(config, plan), seen.classes)
    if missing is not None:
        return [warning("labels", missing)]
    return [fine("labels", "together they mark every class that site.yaml lists.")]


def _check_disk(config: SiteConfig, plan: Plan, seen: _Seen) -> list[Finding]:
    """Compare free disk with prepared scans, pseudo-labels and embeddings.

    A pseudo-label has 3 maps of 2 bytes a voxel and class; while one is made, there are 10 of 4 bytes.
    """
    uses = bool(usable_generalists(config, plan))
    maps = 6 * seen.voxels_unlabeled + 40 * seen.voxels_largest
    needed = seen.bytes + (len(plan.class_names) * maps if uses else 0)
    whole = needed + (int(config.storage.embeddings_gb * 1e9) if uses else 0)
    place = config.storage.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    said = f"prepared scans and pseudo-labels take about {needed / 1e9:.1f} GB, with embeddings up to {whole / 1e9:.1f}"
    said += f" GB; {free / 1e9:.1f} GB are free at {config.storage.folder}"
    if free < needed:
        return [problem("disk", f"{said}. Free some space, or move storage.folder.")]
    if free < whole:
        return [
            warning(
                "disk", f"{said}. Free some space, or lower storage.embeddings_gb at the cost of encoding scans again."
            )
        ]
    return [fine("disk", f"{said}.")]


def _check_weights(subject: str, path: Path, sha256: str | None, published: str) -> Finding:
    try:
        verified_sha256(path, sha256, published)
    except WeightsError as error:
        return problem(subject, f"{error}. Replace it with the published file.")
    return fine(subject, "its weights have the SHA-256 that site.yaml names.")
