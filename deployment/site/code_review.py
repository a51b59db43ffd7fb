"""What a person sees before approving code, and what approval does."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from client.manifest import Manifest, manifest_of
from client.site_config import SiteConfig
from deployment.invitation import Invitation, read_invitation
from deployment.site.bundle import MAXIMUM_PACKED, Bundle, BundleError, FileChange, compare, read_bundle
from deployment.site.code_store import CodeStore
from deployment.site.site_folder import Deployment, SiteFolder, book
from engines.tables import FittingTable
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from semisam_core.text import printable


@dataclass(frozen=True)
class Offer:
    """Code offered for approval.

    Attributes:
        bundle: the code.
        invitation: the invitation it came with, or None for code alone.
    """

    bundle: Bundle
    invitation: Invitation | None


def read_offer(path: Path) -> Offer:
    """Read code alone (.fab), or an invitation with code in it (.zip).

    Raises:
        BundleError: the code cannot be approved.
        InvitationError: the invitation cannot be used.
    """
    if _is_invitation(path):
        invitation = read_invitation(path)
        return Offer(read_bundle(invitation.code, str(path)), invitation)
    try:
        with path.open("rb") as file:
            content = file.read(MAXIMUM_PACKED + 1)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}).") from None
    return Offer(read_bundle(content, str(path)), None)


def show_offer(offer: Offer, folder: SiteFolder, store: CodeStore, console: Console, whole_diff: bool) -> None:
    """Print what the code contains, and how code and plan differ from those in force here.

    Raises:
        ConfigError: the invitation is for another site or study.
        CodeAlteredError: the last approved code was altered.
    """
    bundle = offer.bundle
    lines = sum(content.count(b"\n") for content in bundle.files.values())
    size = sum(len(content) for content in bundle.files.values())
    console.print(f"Code {bundle.hash}", highlight=False)
    console.print(f"{len(bundle.files)} files, {lines} lines, {size} bytes; runs {bundle.component}", highlight=False)
    last = store.last()
    if last is None:
        console.print("No code has been approved here yet, so all of it is new.")
    changes = compare(last.files if last is not None else {}, bundle.files)
    if last is not None and not changes:
        console.print("Every file is the same as in the last approved code.")
    if changes:
        console.print(_table(changes, bundle))
    if whole_diff:
        for change in changes:
            console.print(printable(change.diff), markup=False, highlight=False, soft_wrap=True)
    if offer.invitation is not None:
        _show_plan(offer.invitation, folder, console)
    _show_manifest(offered_manifest(offer, folder), store, console)


def offered_manifest(offer: Offer, folder: SiteFolder) -> Manifest:
    """Return what may leave if an offer is approved.

    Raises:
        ConfigError: the site's YAML or plan is invalid.
    """
    plan = offer.invitation.plan if offer.invitation is not None else folder.plan()
    return manifest_of(folder.config(), plan)


def plan_differences(before: Plan, after: Plan) -> list[str]:
    """Return one line per key of the plan that differs: key: before -> after."""
    return differences(*(json.loads(plan.canonical_json()) for plan in (before, after)))


def differences(before: Any, after: Any) -> list[str]:
    """Return one line per key of nested mappings that differs: key: before -> after."""
    old, new = _flat(before), _flat(after)
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(set(old) | set(new))
        if old.get(key) != new.get(key)
    ]


def approve(offer: Offer, folder: SiteFolder, config: SiteConfig, store: CodeStore) -> None:
    """Log the approval of code and manifest, then store both and the invitation's plan, if there is one.

    Raises:
        OSError: the storage cannot be written.
    """
    manifest, plan = offered_manifest(offer, folder), offer.invitation.plan.hash if offer.invitation else ""
    book(config, "approve", code=offer.bundle.hash, plan=plan, manifest=manifest.hash)
    store.approve(offer.bundle, manifest)
    if offer.invitation is not None:
        folder.adopt(offer.invitation)


def _is_invitation(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "invitation.json" in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _table(changes: list[FileChange], bundle: Bundle) -> FittingTable:
    table = FittingTable("file", "", "lines", "bytes", numbers_from=2)
    for change in changes:
        size = str(len(bundle.files[change.path])) if change.path in bundle.files else "-"
        table.add(printable(change.path), change.kind, f"+{change.added} -{change.removed}", size)
    return table


def _show_plan(invitation: Invitation, folder: SiteFolder, console: Console) -> None:
    here: Deployment = folder.deployment()
    if (invitation.study, invitation.site) != (here.study, here.site):
        raise ConfigError(
            f"the invitation is for site {invitation.site} of study {invitation.study}; this folder is site "
            f"{here.site} of study {here.study}. `semisam site init` makes a folder for another site."
        )
    for line in plan_differences(folder.plan(), invitation.plan) or ["The plan is unchanged."]:
        console.print(printable(line), markup=False, highlight=False)
    if invitation.address != here.address:
        console.print(f"Server: {here.address} -> {invitation.address}", markup=False, highlight=False)
    if invitation.ca_certificate != folder.ca_file.read_bytes():
        console.print("The server's certificate authority has changed. Ask the lead to confirm this.")


def _show_manifest(manifest: Manifest, store: CodeStore, console: Console) -> None:
    """Print what may leave: in short, and how it differs from what was approved last."""
    for kind, items in manifest.messages.items():
        console.print(
            f"May leave in {kind}: {len(items.scalars)} numbers, {len(items.texts)} texts, {len(items.tensors)} "
            f"tensors, {items.most_bytes:,} bytes at most",
            highlight=False,
        )
    last = store.last_manifest()
    if last is not None:
        for line in differences(last, manifest.as_json()) or ["What may leave is unchanged."]:
            console.print(printable(line), markup=False, highlight=False)
    console.print(
        f"Manifest {manifest.hash}; `semisam site manifest` prints all of it.", highlight=False, soft_wrap=True
    )


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        parts = [_flat(nested, f"{key}.{name}" if key else str(name)) for name, nested in value.items()]
        return {name: nested for part in parts for name, nested in part.items()}
    return {key: json.dumps(value, ensure_ascii=False)}
