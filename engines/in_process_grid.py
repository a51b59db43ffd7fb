"""Flower's grid in one process: the real apps and messages, one site after another, no engine and no network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

logger = logging.getLogger(__name__)

Config = Mapping[str, bool | float | int | str]


class InProcessGrid(Grid):
    """Runs a site's ClientApp when its reply is pulled, so that only one reply exists at a time.

    Messages are deep-copied both ways: as over a network, no site shares an object with the server or another site. A
    ClientApp that raises becomes an error reply, as in Flower. Sites work one after another, so no deadline can
    interrupt one.

    Args:
        client_app: what every site runs.
        node_configs: one node config per site; node ids count from 1.
        run_config: the run config of every site.
    """

    def __init__(self, client_app: ClientApp, node_configs: Sequence[Config], run_config: Config) -> None:
        # Flower sets these when it starts a ServerApp; messages cannot be created without them.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
        self._client_app = client_app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node, config in enumerate(node_configs, start=1)
        }
        self._pending: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Ignore the run's description."""

    @property
    def run(self) -> Run:
        """Raise: without an engine there is no run to describe."""
        raise RuntimeError("an in-process grid has no Flower run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return all node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store messages; return their ids."""
        identifiers = []
        for message in messages:
            self._sent += 1
            identifiers.append(str(self._sent))
            message.metadata.__dict__["_message_id"] = identifiers[-1]  # as Flower's own grids do
            self._pending[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the sites on these messages and return the replies, each once."""
        return [self._work(self._pending.pop(each)) for each in list(message_ids) if each in self._pending]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run every site on its message and return the replies."""
        return self.pull_messages(self.push_messages(messages))

    def _work(self, message: Message) -> Message:
        sent = message.metadata
        arriving = Message(
            copy.deepcopy(message.content), sent.dst_node_id, sent.message_type, ttl=sent.ttl, group_id=sent.group_id
        )
        arriving.metadata.__dict__["_message_id"] = sent.message_id
        try:
            reply = self._client_app(arriving, self._contexts[sent.dst_node_id])
        except Exception as error:
            logger.warning("The ClientApp raised %s", type(error).__name__, exc_info=error)
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__)
            return Message(failure, reply_to=arriving)
        if reply.has_error():
            return reply
        return Message(copy.deepcopy(reply.content), reply_to=arriving)


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, node_configs: Sequence[Config], run_config: Config
) -> None:
    """Run a ServerApp with all sites in this process; exceptions of the ServerApp propagate."""
    grid = InProcessGrid(client_app, node_configs, run_config)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server_app(grid, context)
