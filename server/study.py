"""The rounds of one study: ask, admit, weigh, combine, keep, score. Every wait has an end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from semisam_core.agreement import (
    SPECIALIST_RECORD,
    STUDY_RECORD,
    specialist_spec,
    travelling,
    weights_sha256,
)
from semisam_core.errors import SemiSAMError
from semisam_core.inference import new_specialist
from semisam_core.plan import Plan
from server.admission import Admitted, Rejected, admit
from server.aggregation import Update, evidence_weights, weighted_mean
from server.run_folder import RunFolder

logger = logging.getLogger(__name__)
POLL_S = 0.2


class StudyFailedError(SemiSAMError):
    """The study cannot go on; the message says why. All finished rounds are kept."""


@dataclass
class Study:
    """One run of one plan over a grid of sites.

    Attributes:
        plan: the study plan.
        grid: Flower's way to the sites.
        folder: the run's record.
        run: the run's name, which sites use for their own state.
        sites: how many sites are expected; the run starts when all are there or, at the join deadline, with at least
            the plan's minimum.
    """

    plan: Plan
    grid: Grid
    folder: RunFolder
    run: str
    sites: int

    def execute(self) -> None:
        """Run all rounds that are not done yet.

        Raises:
            StudyFailedError: too few sites joined, or no site could use or contribute to a round.
        """
        last = self.folder.last_round()
        if last is None:
            weights = travelling(self.plan, new_specialist(self.plan))
            self.folder.save_round(0, weights, self.plan)
            last = 0
        else:
            weights = self.folder.load_round(last, self.plan)
        nodes = self._join()
        for number in range(last + 1, self.plan.training.rounds + 1):
            weights = self._round(number, weights, nodes)
        self._evaluate(self.plan.training.rounds, weights, nodes, final=True)
        self._select(weights)

    def _join(self) -> list[int]:
        nodes = self._wait_for_nodes()
        answers = self._ask(MessageType.QUERY, nodes, 0, self.plan.aggregation.join_deadline_s)
        joined: dict[str, int] = {}
        for node, answer in answers:
            if isinstance(answer, Rejected):
                self.folder.record("refused", round=0, site=answer.site, reason=answer.reason)
            elif answer.site in joined:
                self.folder.record("refused", round=0, site=answer.site, reason="a second site of this name")
            else:
                joined[answer.site] = node
                self.folder.record("joined", site=answer.site, **answer.scalars)
        needed = self.plan.aggregation.minimum_sites
        if len(joined) < needed:
            raise StudyFailedError(f"{len(joined)} sites joined, the plan needs {needed}. {self._refusals(0)}")
        return [joined[site] for site in sorted(joined)]

    def _wait_for_nodes(self) -> list[int]:
        deadline = time.monotonic() + self.plan.aggregation.join_deadline_s
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= self.sites:
                return nodes
            if time.monotonic() >= deadline:
                if len(nodes) >= self.plan.aggregation.minimum_sites:
                    return nodes
                policy = self.plan.aggregation
                raise StudyFailedError(
                    f"{len(nodes)} of {self.sites} sites connected within {policy.join_deadline_s:g} s; "
                    f"the plan needs {policy.minimum_sites}."
                )
            time.sleep(POLL_S)

    def _round(self, number: int, weights: dict[str, Tensor], nodes: list[int]) -> dict[str, Tensor]:
        began = time.monotonic()
        updates: list[Update] = []
        for _, answer in self._ask(MessageType.TRAIN, nodes, number, self.plan.aggregation.round_deadline_s, weights):
            if isinstance(answer, Rejected):
                self.folder.record("refused", round=number, site=answer.site, reason=answer.reason)
            elif answer.weights is not None:
                updates.append(Update(answer.site, answer.weights, answer.scalars))
                self.folder.record("trained", round=number, site=answer.site, **answer.scalars)
        updates.sort(key=lambda update: update.site)
        if not updates:
            raise StudyFailedError(f"Round {number}: no site contributed. {self._refusals(number)}")
        try:
            progress, classes = number / self.plan.training.rounds, len(self.plan.class_names)
            shares = evidence_weights(updates, self.plan.aggregation, progress, classes)
        except ValueError as error:
            raise StudyFailedError(f"Round {number}: {error}.") from None
        combined = weighted_mean(updates, shares)
        self.folder.save_round(number, combined, self.plan)
        self.folder.record(
            "aggregated",
            round=number,
            rounds=self.plan.training.rounds,
            weights={u.site: s for u, s in zip(updates, shares, strict=True)},
            sha256=weights_sha256(combined),
            seconds=round(time.monotonic() - began, 3),
        )
        if number % self.plan.evaluation.every_rounds == 0 and number < self.plan.training.rounds:
            self._evaluate(number, combined, nodes, final=False)
        return combined

    def _evaluate(self, number: int, weights: dict[str, Tensor], nodes: list[int], final: bool) -> None:
        deadline = self.plan.aggregation.round_deadline_s
        for _, answer in self._ask(MessageType.EVALUATE, nodes, number, deadline, weights, final):
            if isinstance(answer, Rejected):
                self.folder.record("refused", round=number, site=answer.site, reason=answer.reason)
            else:
                self.folder.record("evaluated", round=number, final=final, site=answer.site, **answer.scalars)

    def _select(self, last: dict[str, Tensor]) -> None:
        """Keep the specialist that the plan's selection picks, and say what it was picked by."""
        rounds = self.plan.training.rounds
        if self.plan.selection == "last":
            self._keep_best(rounds, last, "last round; no label was used to select")
            return
        scores: dict[int, list[float]] = {}
        for line in self.folder.records("evaluated"):
            values = [line[f"dice.{name}"] for name in self.plan.class_names if f"dice.{name}" in line]
            if values:
                scores.setdefault(line["round"], []).append(sum(values) / len(values))
        if not scores:
            self._keep_best(rounds, last, "last round; no site sent a validation score")
            return
        best = max(scores, key=lambda number: (sum(scores[number]) / len(scores[number]), number))
        chosen_by = "mean validation Dice over sites and classes; validation labels were used to select"
        self._keep_best(best, self.folder.load_round(best, self.plan), chosen_by)

    def _keep_best(self, number: int, weights: dict[str, Tensor], chosen_by: str) -> None:
        self.folder.save_best(number, weights, self.plan, chosen_by)
        self.folder.record("selected", round=number, by=chosen_by)

    def _ask(
        self,
        kind: str,
        nodes: list[int],
        number: int,
        deadline_s: float,
        weights: Mapping[str, Tensor] | None = None,
        final: bool = False,
    ) -> list[tuple[int, Admitted | Rejected]]:
        study: dict[str, str | int | bool] = {
            "plan": self.plan.canonical_json(),
            "plan-hash": self.plan.hash,
            "run": self.run,
            "round": number,
            "final": final,
        }
        self.folder.record("asked", kind=kind, round=number, sites=len(nodes))
        messages = []
        for node in nodes:
            content = RecordDict({STUDY_RECORD: ConfigRecord({**study})})
            if weights is not None:
                content[SPECIALIST_RECORD] = ArrayRecord({n: Array(v.numpy()) for n, v in weights.items()})
            messages.append(Message(content, dst_node_id=node, message_type=kind, group_id=str(number)))
        replies = list(self.grid.send_and_receive(messages, timeout=deadline_s))
        spec = specialist_spec(self.plan) if kind == MessageType.TRAIN else None
        answers = [(reply.metadata.src_node_id, admit(reply, kind, number, self.plan, spec)) for reply in replies]
        if len(replies) < len(nodes):
            missing = len(nodes) - len(replies)
            self.folder.record("silent", round=number, sites=missing, seconds=deadline_s)
        return answers

    def _refusals(self, number: int) -> str:
        lines = [f"{r['site']}: {r['reason']}" for r in self.folder.records("refused") if r["round"] == number]
        return "; ".join(lines[-20:]) if lines else "No site said why."
