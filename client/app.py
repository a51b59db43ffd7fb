"""The ClientApp: checks a message, has the site do the work, and sends only replies that the egress gate built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import Tensor

import semisam_core
from client.egress import EgressError, EgressGate, ManifestNotApprovedError
from client.manifest import EVALUATE, JOIN, TRAIN, manifest_of
from client.privacy import PrivacyBudgetError, PrivacyLimitError
from client.privacy_ledger import LedgerError
from client.report import SiteReport
from client.restore import BaseNotHeldError, WeightsNotAgreedError, arriving_weights
from client.secure import SecureAggregationError, SecureRound, UpdateTooLargeError, keys_sha256
from client.site import NoUsableCaseError, Site
from client.site_config import SiteConfig, load_site_config, load_site_folder
from client.split import SplitChangedError
from semisam_core.configuration import is_name
from semisam_core.contract import (
    ACTIVE,
    ATTEMPT,
    BASE,
    DROPPED,
    REJECTED,
    REJECTED_ROUND,
    SEALED_BY,
    SECURE_RECORD,
    SITE_KEYS,
    SPECIALIST_RECORD,
    STUDY_RECORD,
    RefusalRule,
    RejectionRule,
    Stage,
    same_version,
)
from semisam_core.errors import ConfigError, WeightsError
from semisam_core.plan import Plan, plan_from_json

logger = logging.getLogger(__name__)

app = ClientApp()
SIMULATION = "simulation"  # in the node config of sites that one researcher runs in one process

# In the node config: the hash of the manifest approved at this site; an empty one fits none.
APPROVED_MANIFEST = "approved-manifest"

# The rule that a message is refused by when the work raises one of these; the first that fits.
RULE_OF_ERROR: tuple[tuple[type[Exception], RefusalRule], ...] = (
    (ManifestNotApprovedError, RefusalRule.MANIFEST_NOT_APPROVED),
    (EgressError, RefusalRule.EGRESS),
    (SplitChangedError, RefusalRule.SPLIT_CHANGED),
    (NoUsableCaseError, RefusalRule.NO_USABLE_CASE),
    (WeightsNotAgreedError, RefusalRule.WEIGHTS),
    (BaseNotHeldError, RefusalRule.BASE_NOT_HELD),
    (PrivacyLimitError, RefusalRule.PRIVACY_LIMITS),
    (PrivacyBudgetError, RefusalRule.PRIVACY_BUDGET),
    (LedgerError, RefusalRule.PRIVACY_LEDGER),
    (WeightsError, RefusalRule.GENERALIST),
    (FloatingPointError, RefusalRule.DIVERGED),
    (UpdateTooLargeError, RefusalRule.UPDATE_TOO_LARGE),
    (SecureAggregationError, RefusalRule.SECURE),
    (ConfigError, RefusalRule.NOTHING_TO_LEARN),
    (OSError, RefusalRule.STORAGE),
)


class _RefusedError(Exception):
    """The site refuses this message, under one of its rules."""

    def __init__(self, rule: RefusalRule, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


@dataclass(frozen=True)
class _Request:
    """A message's request, checked."""

    plan: Plan
    run: str
    round_number: int
    final: bool


@app.query()
def join(message: Message, context: Context) -> Message:
    """Check this site's data and generalists against the plan and reply with counts."""

    def work(site: Site, gate: EgressGate, request: _Request) -> RecordDict:
        report, split = site.join(), site.scans.split_sha256
        return gate.reply(JOIN, request.run, 0, request.plan.hash, report.scalars, split_hash=split)

    return _answer(JOIN, message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round and reply with the agreed scalars and, unless they are summed securely, the tensors."""

    def work(site: Site, gate: EgressGate, request: _Request) -> RecordDict:
        report: SiteReport = site.train(_arriving(message, site))
        about, split = (request.run, request.round_number, request.plan.hash), site.scans.split_sha256
        return gate.reply(TRAIN, *about, report.scalars, report.weights, split, report.patients)

    return _answer(TRAIN, message, context, work)


@app.train("keys")
def keys(message: Message, context: Context) -> Message:
    """Begin a secure sum and reply with fresh public keys."""
    return _take_part(Stage.KEYS, message, context, lambda secure, asked: secure.keys(asked.get(ATTEMPT)))


@app.train("shares")
def shares(message: Message, context: Context) -> Message:
    """Reply with shares of this site's secrets, sealed for the other sites of the sum."""
    return _take_part(
        Stage.SHARES, message, context, lambda secure, asked: secure.shares(asked.get(ATTEMPT), _of(SITE_KEYS, asked))
    )


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """Reply with the round's update, masked."""

    def work(site: Site, gate: EgressGate, request: _Request) -> RecordDict:
        secure, asked = _secure(site), message.content.config_records[SECURE_RECORD]
        vector = secure.masked(asked.get(ATTEMPT), _of(SEALED_BY, asked))
        about = (request.run, request.round_number, request.plan.hash)
        return gate.reply(Stage.MASKED.value, *about, {}, vector, site.scans.split_sha256)

    return _answer(Stage.MASKED.value, message, context, work)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Reply with the shares that remove the masks from the sum."""
    return _take_part(
        Stage.UNMASK,
        message,
        context,
        lambda secure, asked: secure.unmask(asked.get(ATTEMPT), asked.get(ACTIVE), asked.get(DROPPED)),
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the specialist on this site's validation cases and reply with mean scores."""

    def work(site: Site, gate: EgressGate, request: _Request) -> RecordDict:
        report = site.evaluate(_arriving(message, site), request.final)
        about, split = (request.run, request.round_number, request.plan.hash), site.scans.split_sha256
        return gate.reply(EVALUATE, *about, report.scalars, split_hash=split, patients=report.patients)

    return _answer(EVALUATE, message, context, work)


def _arriving(message: Message, site: Site) -> dict[str, Tensor]:
    base = message.content.config_records[STUDY_RECORD].get(BASE)
    return arriving_weights(message.content.array_records[SPECIALIST_RECORD], site.plan, base, site.state)


def _take_part(
    stage: Stage,
    message: Message,
    context: Context,
    act: Callable[[SecureRound, Mapping[str, object]], dict[str, bytes]],
) -> Message:
    """Do one stage of a secure sum and reply with its keys or shares."""

    def work(site: Site, gate: EgressGate, request: _Request) -> RecordDict:
        asked = dict(message.content.config_records[SECURE_RECORD])
        about = (request.run, request.round_number, request.plan.hash)
        material = act(_secure(site), asked)
        if stage is Stage.SHARES:
            offered = _of(SITE_KEYS, asked)
            gate.log_keys(request.run, request.round_number, sorted(offered), keys_sha256(offered))
        return gate.reply(stage.value, *about, {}, split_hash=site.scans.split_sha256, material=material)

    return _answer(stage.value, message, context, work)


def _secure(site: Site) -> SecureRound:
    if site.secure is None:
        raise SecureAggregationError("the plan does not ask for secure aggregation")
    return site.secure


def _of(prefix: str, asked: Mapping[str, object]) -> dict[str, object]:
    """Return site -> item of the items with this prefix."""
    return {name.removeprefix(prefix): value for name, value in asked.items() if name.startswith(prefix)}


def site_config_of(context: Context) -> SiteConfig:
    """Return the config of the site that this process serves.

    A SuperNode names its own YAML (node config ``site-config``); nothing from the wire can override it. In a
    simulation the run config names a folder of YAMLs and the partition picks one.

    Raises:
        ConfigError: neither is given, the file is invalid, or a deployed site's noise could be taken away.
    """
    if "site-config" in context.node_config:
        path = Path(str(context.node_config["site-config"]))
        config = load_site_config(path)
        if config.privacy.noise != "secure" and SIMULATION not in context.node_config:
            raise ConfigError(
                f"{path}: privacy.noise = {config.privacy.noise!r} is for simulations: whoever knows the plan can take "
                "such noise away. Accepted at a deployed site: secure."
            )
        return config
    if "partition-id" not in context.node_config:
        raise ConfigError("this SuperNode names no site file; start it with --node-config 'site-config=\"<path>\"'.")
    folder = str(context.run_config.get("sites", ""))
    if not folder:
        raise ConfigError("a simulation needs the run config key sites: the folder of site YAML files.")
    configs = load_site_folder(Path(folder))
    number = int(context.node_config["partition-id"])
    if number >= len(configs):
        raise ConfigError(f"{folder}: it has {len(configs)} site files, but simulated site {number + 1} was called.")
    return configs[number]


def _answer(
    kind: str,
    message: Message,
    context: Context,
    work: Callable[[Site, EgressGate, _Request], RecordDict],
) -> Message:
    """Do the work and reply. Whatever fails, only the name of a rule leaves."""
    try:
        config = site_config_of(context)
        gate = EgressGate(config.site, config.egress, config.storage.folder / "audit.jsonl", _approved(context))
        return Message(_work(kind, message, config, gate, work), reply_to=message)
    except ConfigError as error:
        logger.error("This site cannot work: %s", error)
        rule = RefusalRule.SITE_CONFIG
    except Exception as error:
        logger.error("This site cannot write its audit log, so it sends nothing", exc_info=error)
        rule = RefusalRule.AUDIT_LOG
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, rule.value), reply_to=message)


def _approved(context: Context) -> str | None:
    """Return the hash of the manifest that people approved. A deployed site's own worker always names one."""
    named = context.node_config.get(APPROVED_MANIFEST)
    return None if named is None else str(named)


def _work(
    kind: str,
    message: Message,
    config: SiteConfig,
    gate: EgressGate,
    work: Callable[[Site, EgressGate, _Request], RecordDict],
) -> RecordDict:
    run, round_number = _names_for_log(message)
    _log_rejection(message, gate, run)
    try:
        request = _request_of(message)
        gate.agree(manifest_of(config, request.plan))
        site = Site(config, request.plan, request.run, request.round_number)
        return work(site, gate, request)
    except _RefusedError as refused:
        return gate.refuse(kind, run, round_number, refused.rule, str(refused))
    except Exception as error:
        rule = next((rule for known, rule in RULE_OF_ERROR if isinstance(error, known)), RefusalRule.INTERNAL)
        logger.warning("Round %d: refused by rule %s", round_number, rule.value, exc_info=error)
        return gate.refuse(kind, run, round_number, rule, f"{type(error).__name__}: {error}")


def _log_rejection(message: Message, gate: EgressGate, run: str) -> None:
    """Log that the server rejected this site's last update, if the message says so."""
    study = message.content.config_records.get(STUDY_RECORD)
    if study is None or REJECTED not in study:
        return
    word, number = study[REJECTED], study.get(REJECTED_ROUND)
    rule = next((known.value for known in RejectionRule if known.value == word), "unknown")
    round_number = number if type(number) is int else -1
    logger.warning("The server rejected this site's update of round %d by rule %s", round_number, rule)
    gate.log_rejection(run, round_number, rule)


def _names_for_log(message: Message) -> tuple[str, int]:
    """Return run and round as they may be logged: "?" and -1 where the message has no valid ones."""
    study = message.content.config_records.get(STUDY_RECORD)
    run, number = (study.get("run"), study.get("round")) if study is not None else (None, None)
    return (run if is_name(run) else "?"), (number if type(number) is int else -1)


def _request_of(message: Message) -> _Request:
    study = message.content.config_records.get(STUDY_RECORD)
    if study is None:
        raise _RefusedError(RefusalRule.PLAN_INVALID, "the message has no study record")
    if not same_version(study.get("code-version"), semisam_core.__version__):
        theirs, ours = study.get("code-version"), semisam_core.__version__
        raise _RefusedError(RefusalRule.VERSION, f"the server runs version {theirs!r}, this site {ours}")
    try:
        plan = plan_from_json(str(study.get("plan", "")))
    except ConfigError as error:
        raise _RefusedError(RefusalRule.PLAN_INVALID, str(error)) from None
    if plan.hash != study.get("plan-hash"):
        raise _RefusedError(RefusalRule.PLAN_HASH, "the plan does not match the hash that came with it")
    run, number = study.get("run"), study.get("round")
    if not is_name(run):
        raise _RefusedError(RefusalRule.RUN_NAME, "the run's name is malformed")
    if type(number) is not int or not 0 <= number <= plan.training.rounds:
        raise _RefusedError(
            RefusalRule.PLAN_INVALID, f"the plan has no such round; it has rounds 1 to {plan.training.rounds}"
        )
    return _Request(plan, run, number, bool(study.get("final", False)))
