"""`semisam review ...`: the commands of the room `review`, which end as all commands do when something is wrong."""

from __future__ import annotations

from cli.errors import readable_errors
from review.commands import app

for _command in app.registered_commands:
    if _command.callback is not None:
        _command.callback = readable_errors("What was kept is kept.")(_command.callback)

__all__ = ["app"]
