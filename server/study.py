"""The course of a study: joining, rounds, scores, selection. Every wait has a deadline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

import semisam_core
from semisam_core.contract import (
    BASE,
    HEAD_PREFIX,
    REJECTED,
    REJECTED_ROUND,
    SPECIALIST_RECORD,
    STUDY_RECORD,
    RejectionRule,
    split_update,
    travelling,
    weights_sha256,
)
from semisam_core.errors import SemiSAMError
from semisam_core.inference import initial_weights, new_specialist
from semisam_core.plan import Plan
from semisam_core.secure_aggregation.weights import whole_weights
from server.admission import Admitted, Rejected
from server.aggregation import combine, combine_heads, evidence_weights, votes
from server.arrays import update_reader
from server.downloads import OWED, Download, Downloads
from server.exchange import Content, Exchange, Phase
from server.messages import Clock, Mailbox
from server.optimizer import ServerOptimizer
from server.outliers import outliers
from server.quorum import Quorum, TooFewSitesError
from server.roster import Roster
from server.run_folder import Checkpoint, RunFolder
from server.secure_sum import SecureSum
from server.updates import UpdateShelf

logger = logging.getLogger(__name__)


class StudyFailedError(SemiSAMError):
    """The study cannot continue; the message says why. All finished rounds are kept."""


@dataclass
class Study:
    """One run of one plan over a grid of sites.

    Attributes:
        plan: the study plan.
        grid: Flower's connection to the sites.
        folder: the run's record.
        run: the run's name, under which sites keep their own state.
        sites: how many sites are expected; the run starts when all have joined or, at the join deadline, with at least
            the plan's minimum.
        clock: the server's clock.
    """

    plan: Plan
    grid: Grid
    folder: RunFolder
    run: str
    sites: int
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        with self.folder.writing("the folder of updates"):
            self._shelf = UpdateShelf(self.folder.incoming)
        self._roster = Roster(self.plan.aggregation.exclusion)
        self._optimizer = ServerOptimizer(self.plan)
        self._downloads = Downloads(self.plan)
        self._reported: dict[str, Any] = {}
        exchange = Exchange(
            self.plan,
            Mailbox(self.grid, self.clock),
            self._roster,
            self.folder,
            self.clock,
            self._report,
            lambda: self._content(0),
        )
        self._quorum = Quorum(self.plan, exchange, self.sites)
        self._secure: SecureSum | None = None
        if self.plan.aggregation.secure is not None:
            self._secure = SecureSum(self.plan, exchange, self._stage_content)

    def execute(self) -> None:
        """Run all rounds that have not finished yet.

        Raises:
            StudyFailedError: too few sites joined or contributed to a round.
            RecordNotKeptError: the run folder could not be written.
        """
        try:
            self._execute()
        except TooFewSitesError as error:
            raise StudyFailedError(str(error)) from None
        finally:
            self._shelf.clear()

    def _execute(self) -> None:
        rounds = self.plan.training.rounds
        start = self._start()
        self._quorum.gather(start.round)
        weights = start.weights
        if 0 < start.round < rounds and not self._scored(start.round):
            self._evaluate(start.round, weights, final=False)
        for number in range(start.round + 1, rounds + 1):
            weights = self._round(number, weights)
            if self._due(number):
                self._evaluate(number, weights, final=False)
        self._evaluate(rounds, weights, final=True)
        self._select(weights)

    def _start(self) -> Checkpoint:
        """Return where to resume: the newest intact checkpoint, or the initial specialist."""
        found = self.folder.newest(self.plan)
        if found is None:
            weights = initial_weights(self.plan)
            found = Checkpoint(0, weights, {}, {})
            self.folder.save_round(0, found.weights, self.plan)
        if self.folder.metrics_path.exists():
            self.folder.record("resumed", round=found.round)
        done = self.folder.records("aggregated")
        if found.record and found.round not in {line["round"] for line in done}:
            self.folder.record("aggregated", **found.record)
            done = self.folder.records("aggregated")
        self._roster.replay(done)
        names = [line["site"] for event in ("joined", "rejoined") for line in self.folder.records(event)]
        self._roster.remember(names)
        if found.round > 0:
            owed = {name: value for name, value in found.moments.items() if name.startswith(OWED)}
            moments = {name: value for name, value in found.moments.items() if name not in owed}
            self._optimizer.load(moments, found.weights)
            self._downloads.load(owed)
        return found

    def _round(self, number: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        began = self.clock.now()
        self._shelf.clear()
        if number > 1 and self.plan.training.local_round(number) == 1:
            weights = self._new_generation(number, weights)

        reports: dict[str, dict[str, float]] = {}

        def accept(answer: Admitted) -> None:
            if answer.weights is not None:
                with self.folder.writing(f"the update of {answer.site}"):
                    self._shelf.add(answer.site, answer.weights, answer.estimates, weights)
            reports[answer.site] = answer.estimates
            self.folder.record("trained", round=number, site=answer.site, **answer.scalars)

        download = self._downloads.of(weights)
        phase = self._quorum.train(
            number,
            lambda site, rejected: self._content(number, download(site), rejected=rejected),
            accept,
            self._review,
            update_reader(self.plan, weights) if self._secure is None else None,
        )
        if self._secure is None:
            combined, record = self._combine(number, phase, weights)
        else:
            combined, record = self._sum(self._secure, number, phase, weights, reports)
        try:
            combined = self._downloads.advance(weights, combined, phase.done)
        except FloatingPointError as error:
            raise StudyFailedError(f"Round {number}: {error}.") from None
        record |= {"sha256": weights_sha256(combined)}
        record |= {"rounds": self.plan.training.rounds, "seconds": round(self.clock.now() - began, 3)}
        self.folder.save_round(number, combined, self.plan, record, self._optimizer.state() | self._downloads.state())
        self.folder.record("aggregated", **record)
        for left in self._roster.close_round(number, phase.done, phase.failed):
            content = {"site": left.site, "reason": left.reason, "failures": left.failures, "until": left.until}
            self.folder.record("excluded", round=number, **content)
        self._shelf.clear()
        return combined

    def _new_generation(self, number: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a new specialist in place of the global one; the feature head, a source of pseudo-labels, goes on."""
        generation = (number - 1) // self.plan.training.rounds_per_generation
        fresh = self.plan.model_copy(update={"seed": (self.plan.seed + generation) % 2**31})
        self._optimizer = ServerOptimizer(self.plan)
        self._downloads.restart()
        self.folder.record("generation", round=number, generation=generation + 1)
        head = {name: value for name, value in weights.items() if name.startswith(HEAD_PREFIX)}
        return travelling(self.plan, new_specialist(fresh)) | head

    def _review(self) -> list[Rejected]:
        """Drop the updates that do not fit the others, and return why each was dropped."""
        found = outliers(self._shelf.updates, self.plan.aggregation.admission)
        for answer in found:
            self._shelf.drop(answer.site)
        return found

    def _combine(
        self, number: int, phase: Phase, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the new global weights and what the run records about them."""
        updates, policy = self._shelf.updates, self.plan.aggregation
        try:
            training, classes = self.plan.training, len(self.plan.class_names)
            progress = training.local_round(number) / training.rounds_per_generation
            shares = votes(updates, evidence_weights(updates, policy, progress, classes), policy, len(phase.rejected))
        except ValueError as error:
            raise StudyFailedError(f"Round {number}: {error}.") from None
        combined = self._optimizer.step(weights, combine(updates, shares, policy))
        combined |= combine_heads(updates, weights, policy, len(phase.rejected))
        return combined, {
            "round": number,
            "weights": {u.site: s for u, s in zip(updates, shares, strict=True)},
            "failed": dict(sorted(phase.failed.items())),
        }

    def _sum(
        self,
        secure: SecureSum,
        number: int,
        phase: Phase,
        weights: dict[str, Tensor],
        reports: Mapping[str, Mapping[str, float]],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the new global weights and what the run records about them, from the sum of the sites' updates."""
        having = [site for site, scalars in reports.items() if whole_weights(scalars, self.plan, number).specialist > 0]
        found = secure.mean(number, having, weights)
        phase.done -= found.lost.keys()
        phase.failed |= found.lost
        head = {name: value for name, value in found.mean.tensors.items() if name.startswith(HEAD_PREFIX)}
        specialist = {name: value for name, value in found.mean.tensors.items() if name not in head}
        combined = self._optimizer.step(weights, specialist) | head
        return combined, {
            "round": number,
            "weights": dict.fromkeys(found.sites),  # each site's own is known to the site alone
            "total_weight": found.mean.weights.specialist,
            "head_weight": found.mean.weights.head,
            "failed": dict(sorted(phase.failed.items())),
        }

    def _due(self, number: int) -> bool:
        return number % self.plan.evaluation.every_rounds == 0 and number < self.plan.training.rounds

    def _scored(self, number: int) -> bool:
        """Return whether a round has all the scores that it should have."""
        return not self._due(number) or number in {line["round"] for line in self.folder.records("scored")}

    def _evaluate(self, number: int, weights: dict[str, Tensor], final: bool) -> None:
        def accept(answer: Admitted) -> None:
            self.folder.record("evaluated", round=number, final=final, site=answer.site, **answer.scalars)

        download = self._downloads.of(weights)
        phase = self._quorum.evaluate(
            number, lambda site, rejected: self._content(number, download(site), final, rejected), accept, final
        )
        self.folder.record("scored", round=number, final=final, sites=len(phase.done))

    def _select(self, last: dict[str, Tensor]) -> None:
        """Save the specialist that the plan's selection picks, and record how it was picked."""
        rounds = self.plan.training.rounds
        if self.plan.selection == "last":
            self._keep_best(rounds, last, "last round; no label was used to select")
            return
        scores: dict[int, dict[str, float]] = {}
        for line in self.folder.records("evaluated"):
            values = [line[f"dice.{name}"] for name in self.plan.class_names if f"dice.{name}" in line]
            if values:
                # By site, so that a round scored twice because the server died in between counts once.
                scores.setdefault(line["round"], {})[line["site"]] = sum(values) / len(values)
        if not scores:
            self._keep_best(rounds, last, "last round; no site sent a validation score")
            return
        means = {number: sum(sites[name] for name in sorted(sites)) / len(sites) for number, sites in scores.items()}
        best = max(means, key=lambda number: (means[number], number))
        chosen_by = "mean validation Dice over sites and classes; validation labels were used to select"
        self._keep_best(best, self.folder.load_round(best, self.plan), chosen_by)

    def _keep_best(self, number: int, weights: dict[str, Tensor], chosen_by: str) -> None:
        self.folder.save_best(number, split_update(weights)[0], self.plan, chosen_by)
        self.folder.record("selected", round=number, by=chosen_by)

    def _content(
        self,
        number: int,
        download: Download | None = None,
        final: bool = False,
        rejected: tuple[RejectionRule, int] | None = None,
    ) -> RecordDict:
        study: dict[str, str | int | bool] = {
            "plan": self.plan.canonical_json(),
            "plan-hash": self.plan.hash,
            "code-version": semisam_core.__version__,
            "run": self.run,
            "round": number,
            "final": final,
        }
        if rejected is not None:
            study |= {REJECTED: rejected[0].value, REJECTED_ROUND: rejected[1]}
        if download is not None and download.base is not None:
            study[BASE] = download.base
        content = RecordDict({STUDY_RECORD: ConfigRecord({**study})})
        if download is not None:
            content[SPECIALIST_RECORD] = ArrayRecord(dict(download.arrays))
        return content

    def _stage_content(self, number: int) -> Content:
        return lambda _, rejected: self._content(number, rejected=rejected)

    def _report(self, phase: str, number: int, waiting_for: list[str], reason: str) -> None:
        status = {"phase": phase, "round": number, "waiting_for": waiting_for, "reason": reason}
        if status != self._reported:
            self._reported = status
            self.folder.set_status("running", reason, run=self.run, phase=phase, round=number, waiting_for=waiting_for)
