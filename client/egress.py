"""The only way out of a site: every reply is built here, from agreed tensors and agreed scalars alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from client.audit_log import AuditLog
from client.site_config import Egress
from semisam_core.contract import (
    METRICS_RECORD,
    REFUSAL_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    SPLIT_HASH,
    RefusalRule,
    TensorSpec,
    disagreement,
    is_sha256,
    weights_sha256,
)
from semisam_core.errors import SemiSAMError
from semisam_core.files import utc_stamp


class EgressError(SemiSAMError):
    """A reply held something that may not leave. Nothing was sent."""


class EgressGate:
    """Builds every reply, and logs each in the site's audit log before it is sent.

    Args:
        site: the site's name; besides hashes and rules the only text that leaves.
        limits: the site's own limits.
        log: the audit log's file.
    """

    def __init__(self, site: str, limits: Egress, log: Path) -> None:
        self._site, self._limits, self._log = site, limits, AuditLog(log)

    def reply(
        self,
        kind: str,
        run: str,
        round_number: int,
        plan_hash: str,
        scalars: Mapping[str, float | int],
        agreed_scalars: Sequence[str],
        tensors: Mapping[str, Tensor] | None = None,
        agreed_tensors: Mapping[str, TensorSpec] | None = None,
        split_hash: str | None = None,
    ) -> RecordDict:
        """Build a reply.

        Args:
            kind: join, train or evaluate.
            run: the run's name.
            round_number: counts from 1; 0 for join.
            plan_hash: hash of the plan this site works under.
            scalars: the scalars to send; each name must be agreed, each value a finite number.
            agreed_scalars: the agreed names.
            tensors: the specialist's tensors to send, or None.
            agreed_tensors: their agreed names, shapes and dtypes; required if there are tensors.
            split_hash: keyed hash of the run's split by patient, or None to send none.

        Raises:
            EgressError: something is not agreed, not finite or over the site's limits.
            OSError: the audit log cannot be written. The reply must not be sent.
        """
        if unknown := sorted(set(scalars) - set(agreed_scalars)):
            raise EgressError(f"the scalars {unknown} are not on the agreed list")
        for name, value in scalars.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise EgressError(f"the scalar {name} is not a finite number")
        records = RecordDict({METRICS_RECORD: MetricRecord(dict(scalars))})
        about = ConfigRecord({"site": self._site, "round": round_number, "plan-hash": plan_hash})
        entry: dict[str, object] = {"scalars": dict(scalars)}
        if split_hash is not None:
            if not is_sha256(split_hash):
                raise EgressError("the split's hash is no SHA-256")
            about[SPLIT_HASH] = entry["split"] = split_hash
        records[SITE_RECORD] = about
        if tensors is not None:
            entry |= self._check_tensors(tensors, agreed_tensors)
            records[SPECIALIST_RECORD] = ArrayRecord(
                {name: Array(tensors[name].detach().cpu().contiguous().numpy()) for name in tensors}
            )
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
        self._audit(kind, run, round_number, "", entry if code_hash is None else entry | {"code": code_hash})
        return RecordDict(
            {
                REFUSAL_RECORD: ConfigRecord({"rule": rule.value}),
                SITE_RECORD: ConfigRecord({"site": self._site, "round": round_number, "plan-hash": ""}),
            }
        )

    def log_rejection(self, run: str, round_number: int, rule: str) -> None:
        """Log that the server rejected this site's update of a round. Nothing is sent.

        Raises:
            OSError: the audit log cannot be written.
        """
        self._audit("rejected", run, round_number, "", {"rejected_by_the_server": rule})

    def _check_tensors(
        self, tensors: Mapping[str, Tensor], agreed: Mapping[str, TensorSpec] | None
    ) -> dict[str, object]:
        if agreed is None:
            raise EgressError("no tensors are agreed for this message")
        if mistake := disagreement(tensors, agreed):
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


def arriving_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of an array record, unchecked."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
