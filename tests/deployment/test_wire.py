"""What two deployed hospitals send, captured in the clear: no planted name, and no byte that is not accounted for."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.proto.message_pb2 import PushObjectRequest
from typer.testing import CliRunner

from cli.main import app
from semisam_core.configuration import override
from semisam_core.contract import (
    COUNTS_WORD,
    JOIN_SCALARS,
    METRICS_RECORD,
    REFUSAL_RECORD,
    SITE_RECORD,
    SPECIALIST_RECORD,
    TRAIN_SCALARS,
    RefusalRule,
    evaluation_scalars,
    update_spec,
)
from semisam_core.files import read_json_lines
from semisam_core.packing import packed_spec
from tests.conftest import blob, tiny_plan
from tests.deployment.capture import Capture
from tests.deployment.deployment import eventually, semisam
from tests.deployment.lead.conftest import processes_of, two_free_ports
from tests.deployment.search import found_among, found_in, streams_in
from tests.deployment.wire import Reply, Request, check_heads, replies_of, requests_of, sessions_of
from tests.intake.dicoms import write_seg, write_series

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RUN_S = 500.0
PLAN = tiny_plan(
    "pseudo_labels=null",
    "training.rounds=1",
    "aggregation.minimum_sites=1",
    "aggregation.join_deadline_s=200",
    "aggregation.round_deadline_s=200",
)
# What must not leave, by where it is planted. In headers only so many characters fit.
PLANTED = {
    "a folder": "Quackenbush-Ward-7",
    "a file": "Zebulon_Pfefferkorn",
    "descrip": "Brunhilde^Aufderheide^19420101",
    "aux_file": "MRN-88214733",
    "db_name": "Klausthaler-Z",
    "intent_name": "Ottokar-Zwinge",
    "a corrupt scan": "Melchior_Kaltwasser",
    "another corrupt scan": "Ursula_Hagedornbusch",
    "a DICOM patient": "Vandersloot^Philippa",
    "a DICOM number": "PID-5530918",
    "a DICOM description": "Thorax of Wolkenstein",
    "the patients' file": "Patient-Nachtigaller",
    "a comment in site.yaml": "Doctor-Immerwahr-Pager-4711",
}
# In bytes: what Flower writes around what is sent. Measured: 228 an object, 848 a head, 130 around an object, 227.
FRAMING_OF_OBJECT = 250
HEAD = 900
AROUND_OBJECT = 150
OTHER_BODY = 250


@dataclass(frozen=True)
class Sent:
    """What one site sent and received, and its folder."""

    site: Path
    capture: Capture
    requests: list[Request]

    @property
    def audit(self) -> list[dict[str, Any]]:
        """The site's audit log, without what its staff decided."""
        lines = read_json_lines(self.site / "storage" / "audit.jsonl")
        return [line for line in lines if line["kind"] in ("join", "train", "evaluate")]

    @property
    def public_key(self) -> bytes:
        """The site's public key, PEM."""
        key = load_ssh_public_key((self.site / "keys" / "site-key.pub").read_bytes())
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def replies(self) -> list[Reply]:
        """The replies, read from the captured bytes."""
        return replies_of(self.requests)


def _typed(*arguments: str | Path) -> None:
    """Run a `semisam` command in this process."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output


def _write(path: Path, volume: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0]))
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[name] = PLANTED[name].encode()
    nib.save(image, path)


def _write_corrupt(path: Path) -> None:
    """Write a scan that ends in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"whole-{path.name}")
    _write(whole, blob()[0])
    path.write_bytes(gzip.compress(gzip.decompress(whole.read_bytes())[:5000]))
    whole.unlink()


def _hospital(folder: Path) -> Path:
    """Write the scans of a hospital that imported one from DICOM and put others beside it; return their folder."""
    export, data = folder / "export" / PLANTED["a folder"], folder / PLANTED["a folder"]

    def identify(dataset: Any, number: int) -> None:
        dataset.PatientName, dataset.PatientID = PLANTED["a DICOM patient"], PLANTED["a DICOM number"]
        dataset.StudyDescription = dataset.SeriesDescription = PLANTED["a DICOM description"]

    image, label = blob(seed=7)
    files = write_series(export / PLANTED["a DICOM number"], image.T.astype(np.int16), change=identify)
    write_seg(export / "seg", files, label.T[..., None], ["Blob"])
    _typed("import", export, "--out", data, "--classes", "blob=1")
    for k in range(3):
        image, label = blob(seed=k)
        _write(data / "images" / f"{PLANTED['a file']}-{k}.nii.gz", image)
        _write(data / "labels" / f"{PLANTED['a file']}-{k}.nii.gz", label)
    _write_corrupt(data / "images" / f"{PLANTED['a corrupt scan']}.nii.gz")
    manifest = json.loads((data / "manifest.json").read_text())
    first, patient = manifest["cases"][0], PLANTED["the patients' file"]
    for k, name in enumerate([PLANTED["a corrupt scan"], *(f"{PLANTED['a file']}-{k}" for k in range(3))]):
        manifest["cases"].append(first | {"case": name, "patient": f"{patient}-{k}"})
    (data / "manifest.json").write_text(json.dumps(manifest))
    return data


def _joined(study: Path, name: str, data: Path, labeled: list[str], validation: list[str], capture: Capture) -> Path:
    """Set up a site that reaches the server through a capture; return its folder."""
    folder = study.parent / name
    _typed("lead", "invite", name, "--study", study)
    invitation = study / "sites" / f"{name}.invitation.zip"
    images, labels = data / "images", data / "labels"
    _typed("site", "init", invitation, "--images", images, "--labels", labels, "--folder", folder)
    written = [f"data.labeled={labeled}", f"data.validation={validation}", "device=cpu", "threads=1"]
    path = folder / "site.yaml"
    content = override(yaml.safe_load(path.read_text()), written)
    path.write_text(f"# {PLANTED['a comment in site.yaml']}\n" + yaml.safe_dump(content))
    _typed("site", "approve", invitation, "--yes", "--folder", folder)
    _typed("lead", "admit", name, folder / "keys" / "site-key.pub", "--study", study)
    deployment = folder / "deployment.json"
    deployment.write_text(json.dumps(json.loads(deployment.read_text()) | {"address": capture.address}))
    return folder


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sent]]:
    """Return what two sites sent in a run of one round: one that trains, one all of whose scans are corrupt."""
    folder = tmp_path_factory.mktemp("wire")
    study, port = folder / "atrium", two_free_ports()
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN.model_dump(mode="json")))
    good, bad = _hospital(folder), folder / "bad"
    _write_corrupt(bad / "images" / f"{PLANTED['another corrupt scan']}.nii.gz")
    _write(bad / "labels" / f"{PLANTED['another corrupt scan']}.nii.gz", blob()[1])
    _typed("lead", "init", study, "--plan", folder / "plan.yaml", "--port", str(port), "--sites", "2")
    named = PLANTED["a file"]
    with Capture(port, study / "tls") as north, Capture(port, study / "tls") as south:
        sites = {
            "north": _joined(study, "north", good, [f"{named}-0"], [f"{named}-1"], north),
            "south": _joined(study, "south", bad, [PLANTED["another corrupt scan"]], [], south),
        }
        captures = {"north": north, "south": south}
        try:
            semisam("lead", "start", "--study", study, seconds=RUN_S)
            for site in sites.values():
                semisam("site", "start", "--folder", site, seconds=RUN_S)
            semisam("lead", "run", "--study", study, seconds=RUN_S)
            eventually("north has sent its scores", lambda: _answered(captures["north"], 3))
            sent = {
                name: Sent(sites[name], capture, [each for one in capture.exchanges for each in requests_of(one)])
                for name, capture in captures.items()
            }
            yield sent
        finally:
            for site in sites.values():
                if (site / "running" / "process.json").exists():
                    semisam("site", "stop", "--folder", site)
            semisam("lead", "stop", "--study", study)
    assert processes_of(folder) == []


def _answered(capture: Capture, count: int) -> bool:
    calls = [request.call for one in list(capture.exchanges) for request in requests_of(one)]
    return calls.count("push-messages") >= count


def test_the_capture_holds_the_whole_study(wire: dict[str, Sent]) -> None:
    north, south = wire["north"], wire["south"]
    assert [reply.kind.partition(".")[0] for reply in north.replies] == ["query", "train", "evaluate"]
    assert [line["kind"] for line in north.audit] == ["join", "train", "evaluate"]
    assert [reply.texts["rule"] for reply in south.replies] == [RefusalRule.NO_USABLE_CASE]
    for site, sent in wire.items():
        assert found_in(b"".join(bytes(each.sent) for each in sent.capture.exchanges), site)
        assert found_in(b"".join(bytes(each.received) for each in sent.capture.exchanges), "semisam_core")  # the code


def test_what_was_planted_was_there_to_be_leaked(wire: dict[str, Sent]) -> None:
    quarantined = next((wire["north"].site / "storage" / "runs").rglob("quarantine.json")).read_text()
    assert PLANTED["a corrupt scan"] in quarantined
    kept = [line.get("reason_kept_here", "") for line in wire["south"].audit]
    assert any("scan" in reason or "case" in reason for reason in kept)
    here = b"".join(path.read_bytes() for path in wire["south"].site.rglob("*") if path.is_file())
    assert found_in(here, PLANTED["another corrupt scan"])
    scans = yaml.safe_load((wire["north"].site / "site.yaml").read_text())["data"]["images"]
    everything = b"".join(path.read_bytes() for path in Path(scans).parents[1].rglob("*") if path.is_file())
    names = " ".join(map(str, Path(scans).parents[1].rglob("*")))
    missed = [where for where, text in PLANTED.items() if text not in names and not found_in(everything, text)]
    assert missed == []


@pytest.mark.parametrize("site", ["north", "south"])
@pytest.mark.parametrize("direction", ["sent", "received"])
def test_no_planted_text_is_on_the_wire_in_any_encoding(wire: dict[str, Sent], site: str, direction: str) -> None:
    captured = [bytes(getattr(exchange, direction)) for exchange in wire[site].capture.exchanges]
    streams = [each for content in captured for each in [("", content), *streams_in(content)]]
    assert {where: found for where, text in PLANTED.items() if (found := found_among(streams, text))} == {}


def test_a_site_sends_what_is_agreed_and_its_audit_log_says_so(wire: dict[str, Sent]) -> None:
    joined, trained, evaluated = wire["north"].replies
    agreed = (JOIN_SCALARS, TRAIN_SCALARS, evaluation_scalars(PLAN))
    for reply, line, names in zip((joined, trained, evaluated), wire["north"].audit, agreed, strict=True):
        assert set(reply.message.content) <= {METRICS_RECORD, SITE_RECORD, SPECIALIST_RECORD}
        assert set(reply.scalars) <= set(names)
        assert reply.scalars == line["scalars"]
        assert set(reply.texts) <= {"site", "round", "plan-hash", "split-hash", COUNTS_WORD}
        assert (reply.texts["site"], reply.texts["plan-hash"]) == ("north", PLAN.hash)
        assert reply.texts["split-hash"] == line["split"]
        assert reply.tensor_bytes == line.get("bytes", 0)
    assert {name: array.shape for name, array in trained.arrays.items()} == {
        name: spec.shape for name, spec in packed_spec(update_spec(PLAN)).items()
    }
    (refusal,) = wire["south"].replies
    assert set(refusal.message.content) == {REFUSAL_RECORD, SITE_RECORD}
    assert refusal.texts == {"rule": RefusalRule.NO_USABLE_CASE, "site": "south", "round": 0, "plan-hash": ""}


def test_a_message_takes_at_most_ten_requests_whatever_the_specialist(wire: dict[str, Sent]) -> None:
    calls = Counter(request.call for request in wire["north"].requests)
    replies = wire["north"].replies
    assert [1 + len(reply.objects) for reply in replies] == [5, 8, 5]  # an announcement, then one for each object
    assert calls["push-messages"] == len(replies)
    assert len(_pushed(wire["north"].requests)) == sum(len(reply.objects) for reply in replies)
    assert calls["pull-object"] + calls["confirm-message-received"] <= 10 * len(replies)


def _pushed(requests: list[Request]) -> set[tuple[str, str]]:
    """Return the objects pushed, by session; one sent again, after a connection was lost, counts once."""
    messages = [request.message for request in requests if request.call == "push-object"]
    return {(each.session_id, each.object_id) for each in messages if isinstance(each, PushObjectRequest)}


@pytest.mark.parametrize("site", ["north", "south"])
def test_every_byte_that_a_site_sent_is_accounted_for(wire: dict[str, Sent], site: str) -> None:
    requests, replies = wire[site].requests, wire[site].replies
    sent = sum(len(exchange.sent) for exchange in wire[site].capture.exchanges)
    read = sum(len(request.head) + 4 + len(request.body) for request in requests)
    incomplete = len(wire[site].capture.exchanges) * (HEAD + OTHER_BODY)
    assert read <= sent <= read + incomplete
    assert check_heads(requests, wire[site].capture.address, wire[site].public_key) <= HEAD
    sessions = sessions_of(requests)
    for request in requests:
        message = request.message  # nothing in it that Flower does not know
        if isinstance(message, PushObjectRequest):
            assert message.session_id in sessions
            assert len(request.body) - len(message.object_content) <= AROUND_OBJECT
        elif request.call != "push-messages":
            assert len(request.body) <= OTHER_BODY, request.call
    for reply in replies:
        assert reply.framing <= FRAMING_OF_OBJECT * len(reply.objects)


def test_a_replys_metadata_repeats_the_servers_but_for_two_times(wire: dict[str, Sent]) -> None:
    nodes = set()
    for sent in wire.values():
        for reply in sent.replies:
            about = reply.message.metadata
            assert reply.kind.partition(".")[0] in ("query", "train", "evaluate")
            assert about.group_id in ("0", "1")
            assert about.dst_node_id == 1
            assert 0 < about.ttl <= 2 * PLAN.aggregation.round_deadline_s
            nodes.add((about.run_id, about.src_node_id))
    assert len(nodes) == len(wire)  # one run, one node a site
