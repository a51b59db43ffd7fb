"""The only way out of a site: every reply is built here, from agreed tensors and agreed scalars alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from client.audit_log import AuditLog
from client.manifest import Manifest, MessageItems, counts_word, refusal_items
from client.site_config import Egress
from semisam_core.contract import (
    COUNTS_WORD,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SECURE_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    SPLIT_HASH,
    RefusalRule,
    Stage,
    disagreement,
    material_mistake,
    weights_sha256,
)
from semisam_core.errors import SemiSAMError
from semisam_core.files import utc_stamp
from semisam_core.packing import pack


class EgressError(SemiSAMError):
    """A reply held something that may not leave. Nothing was sent."""


class ManifestNotApprovedError(EgressError):
    """Under this plan and the site's YAML other things would leave than those that people here approved."""


class EgressGate:
    """Builds every reply from what the manifest lists, and logs each in the site's audit log before it is sent.

    Args:
        site: the site's name; besides hashes and rules the only text that leaves.
        limits: the site's own limits.
        log: the audit log's file.
        approved: hash of the manifest that people approved; None where nobody approves, as in a simulation.
    """

    def __init__(self, site: str, limits: Egress, log: Path, approved: str | None = None) -> None:
        self._site, self._limits, self._log, self._approved = site, limits, AuditLog(log), approved
        self._messages: Mapping[str, MessageItems] = {}

    def agree(self, manifest: Manifest) -> None:
        """Let replies hold what a manifest lists. Before that nothing may leave but refusals.

        Raises:
            ManifestNotApprovedError: it is not the manifest that was approved here.
        """
        if self._approved is not None and manifest.hash != self._approved:
            raise ManifestNotApprovedError(
                f"what would leave (manifest {manifest.hash}) is not what was approved here "
                f"({self._approved or 'none'}): the plan or egress in site.yaml has changed. See `semisam "
                "site manifest`, and approve it with `semisam site approve`."
            )
        self._messages = manifest.messages

    def reply(
        self,
        kind: str,
        run: str,
        round_number: int,
        plan_hash: str,
        scalars: Mapping[str, float | int],
        tensors: Mapping[str, Tensor] | None = None,
        split_hash: str | None = None,
        patients: Mapping[str, int] | None = None,
        material: Mapping[str, bytes] | None = None,
    ) -> RecordDict:
        """Build a reply.

        Args:
            kind: join, train, evaluate, fingerprint, or a stage of a secure sum, as in the manifest.
            run: the run's name.
            round_number: counts from 1; 0 for join.
            plan_hash: hash of the plan this site works under.
            scalars: the scalars to send.
            tensors: the tensors to send, or None.
            split_hash: keyed hash of the run's split by patient, or None to send none.
            patients: scalar -> about how many patients it is; needed of each that has a minimum.
            material: keys and shares of a secure sum, if `kind` is one of its stages.

        Raises:
            EgressError: something is not in the manifest, not as it says, or over the site's limits.
            OSError: the audit log cannot be written. The reply must not be sent.
        """
        agreed = self._messages.get(kind)
        if agreed is None:
            raise EgressError(f"no {kind} is in the manifest")
        sent = _released(scalars, agreed, patients or {})
        about: dict[str, str | int] = {"site": self._site, "round": round_number, "plan-hash": plan_hash}
        about[COUNTS_WORD] = counts_word(self._limits)
        entry: dict[str, object] = {"scalars": sent}
        if withheld := sorted(set(scalars) - set(sent)):
            entry["withheld"] = withheld
        if split_hash is not None:
            about[SPLIT_HASH] = entry["split"] = split_hash
        records = RecordDict({METRICS_RECORD: MetricRecord(dict(sent)), SITE_RECORD: _texts(about, agreed)})
        if tensors is not None:
            entry |= self._check_tensors(tensors, agreed)
            vectors = pack(tensors, agreed.tensors)
            records[SPECIALIST_RECORD] = ArrayRecord({name: Array(each.numpy()) for name, each in vectors.items()})
        if material is not None:
            if not agreed.material:
                raise EgressError("no keys or shares are in the manifest for this message")
            if mistake := material_mistake(Stage(kind), material):
                raise EgressError(mistake)
            entry["material"] = {name: len(value) for name, value in material.items()}
            records[SECURE_RECORD] = ConfigRecord({**material})
        self._audit(kind, run, round_number, plan_hash, entry)
        return records

    def refuse(
        self, kind: str, run: str, round_number: int, rule: RefusalRule, reason: str, code_hash: str | None = None
    ) -> RecordDict:
        """Build a refusal. Only the rule leaves; the reason and the hash of refused code stay in the audit log.

        Raises:
            OSError: the audit log cannot be written. The refusal must not be sent.
        """
        entry = {"refused": rule.value, "reason_kept_here": reason}
        number = round_number if 0 <= round_number < 10**6 else -1
        about: dict[str, str | int] = {"site": self._site, "round": number, "plan-hash": "", "rule": rule.value}
        texts = _texts(about, refusal_items(self._site))
        records = RecordDict({REFUSAL_RECORD: ConfigRecord({"rule": str(texts.pop("rule"))}), SITE_RECORD: texts})
        self._audit(kind, run, number, "", entry if code_hash is None else entry | {"code": code_hash})
        return records

    def log_rejection(self, run: str, round_number: int, rule: str) -> None:
        """Log that the server rejected this site's update of a round. Nothing is sent.

        Raises:
            OSError: the audit log cannot be written.
        """
        self._audit("rejected", run, round_number, "", {"rejected_by_the_server": rule})

    def log_keys(self, run: str, round_number: int, sites: Sequence[str], sha256: str) -> None:
        """Log with whom a secure sum is begun, and a hash of their public keys. Nothing is sent.

        Sites that compare these lines see whether the server gave them the same keys.

        Raises:
            OSError: the audit log cannot be written.
        """
        self._audit("secure-keys", run, round_number, "", {"sites": list(sites), "keys_sha256": sha256})

    def _check_tensors(self, tensors: Mapping[str, Tensor], agreed: MessageItems) -> dict[str, object]:
        if not agreed.tensors:
            raise EgressError("no tensors are in the manifest for this message")
        if mistake := disagreement(tensors, agreed.tensors):
            raise EgressError(mistake)
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        if size > self._limits.maximum_update_mb * 1e6:
            raise EgressError(
                f"the update has {size / 1e6:.1f} MB; egress.maximum_update_mb allows {self._limits.maximum_update_mb}"
            )
        return {"tensors": len(tensors), "bytes": size, "sha256": weights_sha256(tensors)}

    def _audit(self, kind: str, run: str, round_number: int, plan_hash: str, entry: Mapping[str, object]) -> None:
        head = {
            "time": utc_stamp(),
            "site": self._site,
            "kind": kind,
            "run": run,
            "round": round_number,
            "plan": plan_hash,
        }
        self._log.append(head | dict(entry))


def _released(
    scalars: Mapping[str, float | int], agreed: MessageItems, patients: Mapping[str, int]
) -> dict[str, float | int]:
    """Return scalars as they may leave: rounded, without those about too few patients.

    Raises:
        EgressError: one is not in the manifest or not as it says, or nothing says about how many patients it is.
    """
    if unknown := sorted(set(scalars) - set(agreed.scalars)):
        raise EgressError(f"the scalars {unknown} are not in the manifest")
    sent = {}
    for name, value in scalars.items():
        item = agreed.scalars[name]
        if mistake := item.mistake(value):
            raise EgressError(f"the scalar {name} {mistake}")
        if item.minimum_patients and name not in patients:
            raise EgressError(f"nothing says about how many patients the scalar {name} is")
        if not item.minimum_patients or patients[name] >= item.minimum_patients:
            sent[name] = item.rounding(value)
    return sent


def _texts(about: Mapping[str, str | int], agreed: MessageItems) -> ConfigRecord:
    """Return the texts of these that the manifest lists; no others leave.

    Raises:
        EgressError: one is not as the manifest says.
    """
    sent = {name: value for name, value in about.items() if name in agreed.texts}
    for name, value in sent.items():
        if mistake := agreed.texts[name].mistake(value):
            raise EgressError(f"{name} {mistake}")
    return ConfigRecord({**sent})
