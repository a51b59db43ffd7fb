"""`semisam site doctor`: find everything that could fail before it does."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from client.audit_check import check_log
from client.manifest import Manifest, manifest_of
from client.site_config import SiteConfig
from deployment.invitation import installed_versions
from deployment.site.code_store import CodeAlteredError, CodeStore
from deployment.site.doctor_data import check_data, check_generalists, check_machine, check_storage
from deployment.site.doctor_server import check_server
from deployment.site.findings import Finding, Level, fine, problem, warning
from deployment.site.privacy import check_privacy
from deployment.site.site_folder import Deployment, SiteFolder, audit_log
from semisam_core.errors import ConfigError
from semisam_core.plan import Plan
from semisam_core.text import printable

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}


def examine(folder: SiteFolder, progress: Console, data: bool, server: bool) -> list[Finding]:
    """Check a site: files, code, versions, data, models, machine, and the connection to the server.

    Args:
        folder: the site's folder.
        progress: where to show a progress bar while scans are read.
        data: whether to read scans.
        server: whether to connect.

    Raises:
        ConfigError: deployment.json was altered.
    """
    deployment = folder.deployment()
    findings = [_check_withdrawn(folder), *_check_versions(deployment)]
    config, plan = _config(folder, deployment, findings), _plan(folder, deployment, findings)
    if config is not None:
        findings += [*_check_code(folder.code(config), deployment), check_storage(config.storage.folder)]
        findings += [_check_log(config), _check_numbers(config)]
    if config is not None and plan is not None:
        findings.append(_check_manifest(folder.code(config), deployment, manifest_of(config, plan)))
        findings += check_generalists(config, plan)
        findings += check_machine(config, plan)
        findings += check_privacy(config, plan)
        with Progress(console=progress, transient=True) as bar:
            task = bar.add_task("reading scans")
            findings += check_data(
                config, plan, data, lambda done, total: bar.update(task, completed=done, total=total)
            )
    return [*findings, *check_server(folder, deployment.address, server)]


def worst(findings: Sequence[Finding]) -> bool:
    """Return whether any finding would make the site fail."""
    return any(finding.level is Level.PROBLEM for finding in findings)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print every finding, then the number at each level."""
    for finding in findings:
        console.print(f"{finding.level.value:8}", style=STYLES[finding.level], end="")
        said = printable(f"{finding.subject}: {finding.sentence}")
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(", ".join(f"{number} {level.value}" for level, number in counts.items()), highlight=False)


def _check_withdrawn(folder: SiteFolder) -> Finding:
    if folder.withdrawn_file.exists():
        return problem(
            "study", "this site has withdrawn and will not start; `semisam site withdraw --undo` reverses that."
        )
    return fine("study", "this site takes part.")


def _check_versions(deployment: Deployment) -> list[Finding]:
    here = installed_versions()
    findings = []
    for package, theirs in deployment.versions.items():
        mine = here.get(package, "not installed")
        if mine == theirs:
            continue
        said = f"{mine} here, {theirs} at the lead; pip install {package}=={theirs}"
        if package == "flwr":
            findings.append(problem(package, f"{said}. Different versions may not be compatible."))
        else:
            findings.append(warning(package, f"{said}. Results may differ in the last digits."))
    return findings or [fine("versions", "the same as at the lead.")]


def _config(folder: SiteFolder, deployment: Deployment, findings: list[Finding]) -> SiteConfig | None:
    try:
        config = folder.config()
    except ConfigError as error:
        findings.append(problem("site.yaml", str(error)))
        return None
    if config.site != deployment.site:
        findings.append(
            problem("site.yaml", f"site = {config.site!r}, but the lead knows this site as {deployment.site!r}.")
        )
    else:
        findings.append(fine("site.yaml", "is valid."))
    return config


def _plan(folder: SiteFolder, deployment: Deployment, findings: list[Finding]) -> Plan | None:
    try:
        plan = folder.plan()
    except ConfigError as error:
        findings.append(problem("plan.yaml", str(error)))
        return None
    if plan.hash != deployment.plan_hash:
        findings.append(warning("plan.yaml", "differs from the invitation's plan, so the checks below may not apply."))
    return plan


def _check_code(store: CodeStore, deployment: Deployment) -> list[Finding]:
    try:
        approved = store.approved()
        for entry in approved:
            store.verified(entry.hash)
    except CodeAlteredError as error:
        return [problem("code", f"{error} Approve it again from the invitation.")]
    if not approved:
        return [
            problem("code", "none is approved, so the site cannot start; run `semisam site approve invitation.zip`.")
        ]
    if deployment.code_hash not in {entry.hash for entry in approved}:
        return [warning("code", "the invitation's code is not approved; if the lead runs it, this site refuses.")]
    return [fine("code", "the invitation's code is approved and its copy is unaltered.")]


def _check_manifest(store: CodeStore, deployment: Deployment, manifest: Manifest) -> Finding:
    """Compare what would leave now with what was approved together with the invitation's code."""
    try:
        approved = {entry.hash: entry.manifest for entry in store.approved()}
    except CodeAlteredError:
        return warning("manifest", "the list of approvals cannot be read.")
    if approved.get(deployment.code_hash, manifest.hash) != manifest.hash:
        return problem(
            "manifest",
            "plan.yaml or egress in site.yaml lets other things leave than what was approved, so the site would "
            "refuse; see `semisam site manifest`, then run `semisam site approve invitation.zip`.",
        )
    return fine("manifest", f"{manifest.hash[:12]}; at most {manifest.most_bytes / 1e6:,.1f} MB in the whole study.")


def _check_numbers(config: SiteConfig) -> Finding:
    egress = config.egress
    if egress.numbers == "exact":
        return warning(
            "small numbers",
            "egress.numbers is exact: counts, scores and losses leave as they are, also those of a single patient. "
            "For data that is neither public nor generated, write rounded.",
        )
    return fine("small numbers", f"scores and losses of fewer than {egress.minimum_patients} patients do not leave.")


def _check_log(config: SiteConfig) -> Finding:
    try:
        check = check_log(audit_log(config))
    except OSError as error:
        return problem("audit log", f"cannot be read ({error}).")
    if check.problems:
        return problem("audit log", f"is not as it was written: {check.problems[0]}; see `semisam site audit verify`.")
    return fine("audit log", f"is whole, {check.entries} entries.")
