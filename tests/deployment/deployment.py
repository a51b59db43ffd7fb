"""A lead and three hospitals, each in its own folder, operated by the commands of the deployment pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from engines.processes import MARK
from semisam_core.configuration import override
from semisam_core.files import read_json_lines
from semisam_core.plan import Plan
from tests.conftest import write_blobs
from tests.deployment.lead.conftest import two_free_ports
from tests.deployment.network import Line

ROOT = Path(__file__).resolve().parents[2]
COMMAND_S = 180.0
WAIT_S = 240.0
SLOW_LINE = 200_000.0
# Site -> labeled and validation cases. The last one has no labels, and a slow line.
HOSPITALS: Mapping[str, tuple[list[str], list[str]]] = {
    "north": (["case-0"], ["case-2"]),
    "south": (["case-0", "case-1"], ["case-2"]),
    "east": ([], []),
}
Found = TypeVar("Found")


def environment() -> dict[str, str]:
    """Return an environment with the virtual environment activated."""
    programs = Path(sys.executable).parent
    own = {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | own | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def begin(*arguments: str | Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a `semisam` command without waiting for it; its output goes to a file."""
    with out.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *map(str, arguments)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )


def semisam(*arguments: str | Path, expected: int = 0, seconds: float = COMMAND_S) -> str:
    """Run a `semisam` command; return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


def eventually(what: str, condition: Callable[[], Found], seconds: float = WAIT_S) -> Found:
    """Wait for a condition to become true; return its value.

    Raises:
        AssertionError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class Hospital:
    """A site and its folder.

    Args:
        name: the site's name.
        folder: what `semisam site init` makes.
        data: its scans and labels.
    """

    def __init__(self, name: str, folder: Path, data: Path) -> None:
        self.name, self.folder, self.data = name, folder, data

    def semisam(self, command: str, *arguments: str | Path) -> str:
        """Run a `semisam site` command in this folder; return its output."""
        return semisam("site", command, *arguments, "--folder", self.folder)

    def join(self, invitation: Path) -> Path:
        """Set the site up as a hospital does; return the public key to send."""
        images, labels = self.data / "images", self.data / "labels"
        self.semisam("init", invitation, "--images", images, "--labels", labels)
        labeled, validation = HOSPITALS[self.name]
        written = [f"data.labeled={labeled}", f"data.validation={validation}", "device=cpu", "threads=1"]
        written.append("egress.numbers=exact")  # generated data, and compared number by number
        self.set(*written, f"privacy.ledger={self.folder.parent / f'{self.name}-ledger'}")
        self.semisam("approve", invitation, "--yes")
        return self.folder / "keys" / "site-key.pub"

    def set(self, *assignments: str) -> None:
        """Change keys of the site's YAML."""
        site_file = self.folder / "site.yaml"
        site_file.write_text(yaml.safe_dump(override(yaml.safe_load(site_file.read_text()), list(assignments))))

    def connect_by(self, line: Line) -> None:
        """Reach the server over a line."""
        path = self.folder / "deployment.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"address": line.address}))

    @property
    def works(self) -> bool:
        """Whether the site is processing a message."""
        return any((self.folder / "running").glob("task-*"))

    @property
    def audit(self) -> list[dict[str, Any]]:
        """The audit log."""
        return read_json_lines(self.folder / "storage" / "audit.jsonl")

    @property
    def failed_calls(self) -> int:
        """How often the SuperNode could not reach the server."""
        return (self.folder / "running" / "supernode.log").read_text().count("Connection attempt failed")

    def processes(self, program: str = "") -> list[psutil.Process]:
        """Return this site's living processes, or those of one program."""
        noted = json.loads((self.folder / "running" / "process.json").read_text())
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.pid == noted["pid"] or process.environ().get(MARK) == noted["mark"]
                if mine and process.status() != psutil.STATUS_ZOMBIE and program in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def kill(self, program: str = "") -> None:
        """Kill this site's processes, or those of one program, as a power cut would."""
        found = self.processes(program)
        assert found, f"{self.name} has no process of {program or 'its own'}"
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=10)


class Deployment:
    """The lead's study folder, its hospitals, and the slow line of one of them.

    Args:
        folder: for everything.
        plan: the study plan.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.study = folder, folder / "atrium"
        self.port = two_free_ports()
        self.line = Line(self.port, SLOW_LINE)
        self.hospitals = {name: Hospital(name, folder / name, folder / "data" / name) for name in HOSPITALS}
        for seed, site in enumerate(self.hospitals.values()):
            write_blobs(site.data, 3, 10 * seed)
            if not any(HOSPITALS[site.name]):
                for label in (site.data / "labels").iterdir():
                    label.unlink()
        self.agree(plan)

    def agree(self, plan: Plan) -> None:
        """Make `plan` the study's plan from the next run on, and have every site approve what would leave under it."""
        text = yaml.safe_dump(plan.model_dump(mode="json"))
        (self.folder / "plan.yaml").write_text(text)
        if not self.study.exists():
            return
        (self.study / "plan.yaml").write_text(text)
        for name, site in self.hospitals.items():
            self.lead("invite", name)
            site.semisam("approve", self._invitation(name), "--yes")
        self.hospitals["east"].connect_by(self.line)  # an invitation names the server's own address

    def _invitation(self, name: str) -> Path:
        return self.study / "sites" / f"{name}.invitation.zip"

    def lead(self, command: str, *arguments: str | Path, expected: int = 0, seconds: float = COMMAND_S) -> str:
        """Run a `semisam lead` command; return its output."""
        return semisam("lead", command, *arguments, "--study", self.study, expected=expected, seconds=seconds)

    def set_up(self) -> None:
        """Follow both pages until all sites are connected."""
        semisam(
            "lead", "init", self.study, "--plan", self.folder / "plan.yaml", "--port", str(self.port), "--sites", "3"
        )
        for name, site in self.hospitals.items():
            self.lead("invite", name)
            self.lead("admit", name, site.join(self._invitation(name)))
        self.hospitals["east"].connect_by(self.line)
        self.lead("start")
        for site in self.hospitals.values():
            site.semisam("doctor")  # exit status 0: no problem found
        self.start_sites()

    def start_sites(self) -> None:
        """Start all hospitals in parallel, each by its own command."""
        logs = {name: self.folder / f"{name}-start.log" for name in self.hospitals}
        commands = {
            name: begin("site", "start", "--folder", site.folder, out=logs[name])
            for name, site in self.hospitals.items()
        }
        for name, command in commands.items():
            assert command.wait(COMMAND_S) == 0, logs[name].read_text()

    def kill_server(self) -> None:
        """Kill only the SuperLink, as the system does when memory runs out."""
        process = psutil.Process(json.loads((self.study / "server" / "superlink.json").read_text())["pid"])
        process.kill()
        psutil.wait_procs([process], timeout=10)

    def end(self) -> None:
        """Stop whatever is still running."""
        try:
            for site in self.hospitals.values():
                if (site.folder / "running" / "process.json").exists():
                    site.semisam("stop")
            if (self.study / "server" / "superlink.json").exists():
                self.lead("stop")
        finally:
            with self.line:
                pass

    @property
    def run_folder(self) -> Path:
        """The folder of the latest run."""
        return max((self.study / "runs").iterdir(), key=lambda path: path.stat().st_ctime)


class Run:
    """What a run writes about itself, as it is now.

    Args:
        folder: its run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The run's name at the sites."""
        return str(json.loads((self.folder / "run.json").read_text())["run"])

    @property
    def state(self) -> str:
        """The run's state."""
        return str(self._status().get("state"))

    @property
    def training(self) -> int:
        """The round in which sites are training, or 0."""
        return self._round_of("training")

    @property
    def evaluating(self) -> int:
        """The round whose specialist sites are evaluating, or 0."""
        return self._round_of("evaluating")

    def events(self, *kinds: str, **matching: object) -> list[dict[str, Any]]:
        """Return the metrics lines of these kinds with these values."""
        lines = read_json_lines(self.folder / "metrics.jsonl")
        return [
            line
            for line in lines
            if line["event"] in kinds and all(line.get(key) == value for key, value in matching.items())
        ]

    def _round_of(self, phase: str) -> int:
        status = self._status()
        return int(status["round"]) if status.get("phase") == phase else 0

    def _status(self) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
