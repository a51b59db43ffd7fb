"""A real TLS server with registered keys, to which sites connect and apps are submitted; it ends with the test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml

import client
import semisam_core
from deployment.invitation import Invitation, installed_versions, write_invitation
from deployment.lead.pki import write_certificates
from engines.processes import ProcessTree
from semisam_core.plan import Plan
from tests.conftest import TINY_PLAN, tiny_plan
from tests.deployment.site.bundles import PYPROJECT

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(sys.executable).parent
WAIT_S = 150.0
# Sends one query to the first site that is there, and writes down what came back.
ASKING = """\
import json, time
from pathlib import Path
import semisam_core
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    asked = dict(context.run_config)
    nodes = []
    for _ in range(600):
        nodes = list(grid.get_node_ids())
        if nodes:
            break
        time.sleep(0.2)
    study = {"run": "first", "round": 0, "final": False, "plan": asked["plan"], "plan-hash": asked["plan-hash"]}
    study["code-version"] = semisam_core.__version__
    content = RecordDict({"study": ConfigRecord(study)})
    message = Message(content, dst_node_id=nodes[0], message_type="query", group_id="0")
    answers = list(grid.send_and_receive([message], timeout=120))
    said = {}
    for answer in answers:
        if answer.has_error():
            said = {"error": answer.error.reason}
        else:
            said = {name: dict(record) for name, record in answer.content.items()}
    Path(asked["out"]).write_text(json.dumps(said, default=str))
"""


def supervised() -> Plan:
    """Return the tiny plan without generalists."""
    return tiny_plan("pseudo_labels=null")


def app_folder(place: Path, client_app: str | None = None) -> Path:
    """Write an app for `flwr run`: the real client or another, and a server that asks once."""
    place.mkdir(parents=True)
    packages = [Path(str(semisam_core.__file__)).parent] + ([Path(str(client.__file__)).parent] * (client_app is None))
    for package in packages:
        for source in package.rglob("*.py"):
            target = place / package.name / source.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    if client_app is not None:
        (place / "client").mkdir()
        (place / "client" / "__init__.py").write_text("")
        (place / "client" / "app.py").write_text(client_app)
    (place / "server").mkdir()
    (place / "server" / "__init__.py").write_text("")
    (place / "server" / "app.py").write_text(ASKING)
    settings = '\n[tool.flwr.app.config]\nplan = ""\nplan-hash = ""\nout = ""\n'
    project = PYPROJECT.replace('version = "0.1.0"', 'version = "0.1.0"\nlicense = "Apache-2.0"\ndependencies = []')
    (place / "pyproject.toml").write_text(project + settings)
    return place


def bundle_of(app: Path) -> bytes:
    """Return the bundle that `flwr run` sends for an app."""
    from flwr.cli.build import build_fab_from_disk

    content = build_fab_from_disk(app)
    return content[0] if isinstance(content, tuple) else content


class Lead:
    """The server and what its lead does.

    Args:
        folder: for certificates, database and logs.
        tree: ends the server.
    """

    def __init__(self, folder: Path, tree: ProcessTree) -> None:
        self.folder, self._tree = folder, tree
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        write_certificates(folder / "tls", "atrium", [], 30)
        home = folder / "home"
        home.mkdir()
        connection = '[superlink]\ndefault = "lab"\n\n[superlink.lab]\n'
        connection += f'address = "{self.address}"\nroot-certificates = "{folder / "tls" / "ca.crt"}"\n'
        (home / "config.toml").write_text(connection)
        self.env = dict(os.environ) | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server; return when it answers."""
        tls, port = self.folder / "tls", self.address.rpartition(":")[2]
        command = [str(PROGRAMS / "flower-superlink"), "--ssl-ca-certfile", str(tls / "ca.crt")]
        command += ["--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")]
        command += ["--enable-supernode-auth", "--host", "127.0.0.1", "--port", port]
        command += ["--database", str(self.folder / "state.db")]
        with (self.folder / "superlink.log").open("ab") as log:
            process = self._tree.start(command, log, log, env=self.env, cwd=self.folder)
        import ssl

        context = ssl.create_default_context(cafile=str(tls / "ca.crt"))

        def healthy() -> bool:
            with urlopen(f"https://{self.address}/health", timeout=2, context=context):
                return True

        eventually(healthy)
        return process

    def register(self, public_key: Path) -> None:
        """Register a site's key."""
        self._flwr("supernode", "register", str(public_key), "lab")

    def invite(self, path: Path, code: bytes, plan: Plan | None = None) -> Path:
        """Write the invitation of site alpha."""
        text = yaml.safe_dump({key: value for key, value in TINY_PLAN.items() if key != "pseudo_labels"}).encode()
        certificate = (self.folder / "tls" / "ca.crt").read_bytes()
        write_invitation(
            path,
            Invitation(
                study="atrium",
                site="alpha",
                address=self.address,
                plan=plan or supervised(),
                plan_text=text,
                ca_certificate=certificate,
                code=code,
                versions=installed_versions(),
            ),
        )
        return path

    def submit(self, app: Path, out: Path) -> None:
        """Submit an app, as anyone with the server's certificate can."""
        plan = supervised()
        config = {"plan": plan.canonical_json(), "plan-hash": plan.hash, "out": str(out)}
        toml = self.folder / f"{out.name}.toml"
        toml.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        self._flwr("run", str(app), "lab", "-c", str(toml))

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), *arguments],
            env=self._tree.environment(self.env),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def lead(folder: Path) -> Iterator[Lead]:
    """Return a lead whose server runs while the context lasts."""
    with ProcessTree() as tree:
        found = Lead(folder, tree)
        found.start()
        yield found


def semisam(*arguments: str | Path, cwd: Path | None = None, expected: int = 0) -> str:
    """Run the `semisam` command as a person does; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def eventually(condition: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """Return what the condition returns once it is true.

    Raises:
        AssertionError: it never was.
    """
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (OSError, ValueError, AssertionError) as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"never came true within {seconds} s") from last


def answered(out: Path) -> Mapping[str, Any]:
    """Return what the server's app recorded of the site's answer."""

    def read() -> tuple[Mapping[str, Any]]:
        return (json.loads(out.read_text()),)

    found: Mapping[str, Any] = eventually(read)[0]
    return found
