"""The page's server over real sockets: who is answered, who is not, and what the bounds are."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from review import server as module
from review.codec import decode, encode
from review.desk import Desk
from review.masks import read_mask
from review.server import FILES, MOST_BODY, PageServer
from review.view import View
from tests.conftest import write_blobs, write_site
from tests.review.site import PLAN, reviewing, trained


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_blobs(folder / "data" / "alpha", 8)
    return trained(write_site(folder, "alpha"))


@pytest.fixture
def server(site: Path) -> Iterator[PageServer]:
    server = PageServer(Desk(reviewing(site, f"r{time.monotonic_ns()}"), 10))
    thread = threading.Thread(target=server.serve_until_idle, args=(60.0,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    assert not thread.is_alive()


def _raw(server: PageServer, request: bytes, end: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def _ask(
    server: PageServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _get(server: PageServer, path: str = "", **headers: str) -> tuple[int, bytes]:
    return _ask(server, f"/{server.token}/{path}", **headers)


def _post(server: PageServer, path: str, content: Any, **headers: str) -> tuple[int, bytes]:
    sent = {"Origin": server.origin, "Content-Type": "application/json"} | headers
    return _ask(server, f"/{server.token}/{path}", "POST", json.dumps(content).encode(), **sent)


def test_it_listens_on_the_loopback_address_only(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert len(server.token) >= 43


@pytest.mark.parametrize("name", FILES)
def test_the_pages_files_are_served_and_ask_nobody_else(server: PageServer, name: str) -> None:
    status, content = _get(server, name)
    assert status == 200
    assert len(content) > 200
    for word in (b"http:", b"https:", b"//cdn", b"@import", b"innerHTML", b"eval(", b"style=", b"onclick"):
        assert word not in content


def test_every_file_of_the_page_is_served_and_no_other() -> None:
    assert {name for name, _ in FILES.values()} == {path.name for path in module.PAGE.iterdir()}


def test_every_answer_forbids_caching_framing_referrers_and_foreign_content(server: PageServer) -> None:
    for path in (f"/{server.token}/", "/", f"/{server.token}/worklist"):
        head = _raw(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        head = head.split(b"\r\n\r\n")[0].lower()
        for line in (
            b"cache-control: no-store",
            b"content-security-policy: default-src 'none'; script-src 'self';",
            b"frame-ancestors 'none'",
            b"referrer-policy: same-origin",
            b"x-content-type-options: nosniff",
            b"cross-origin-resource-policy: same-origin",
        ):
            assert line in head
        assert b"access-control" not in head
        assert b"python" not in head


def test_without_the_token_nothing_is_answered(server: PageServer) -> None:
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    for path in ("/", "/worklist", f"/{wrong}/", f"/{wrong}/worklist", f"/{server.token}"):
        status, content = _ask(server, path)
        assert (status, content) == (404, b"There is no such page."), path
    assert _ask(server, "/", Cookie=server.token, Authorization=f"Bearer {server.token}")[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost", "127.0.0.1", "127.0.0.1:1", "evil.example:80@127.0.0.1", ""]
)
def test_another_host_is_refused(server: PageServer, host: str) -> None:
    """As after DNS rebinding, where a foreign page's name leads to this machine."""
    request = f"GET /{server.token}/worklist HTTP/1.1\r\nHost: {host}\r\n\r\n"
    assert _raw(server, request.encode()).startswith(b"HTTP/1.0 421")


def test_two_hosts_or_none_are_refused(server: PageServer) -> None:
    own = f"Host: 127.0.0.1:{server.server_port}\r\n"
    for hosts in ("", own + "Host: evil.example\r\n", own + own):
        answer = _raw(server, f"GET /{server.token}/worklist HTTP/1.1\r\n{hosts}\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 421")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://localhost:80", ""])
def test_another_origin_is_refused(server: PageServer, origin: str) -> None:
    assert _get(server, "worklist", Origin=origin)[0] == 403
    assert _post(server, "end", {}, Origin=origin)[0] == 403
    assert _get(server, "worklist")[0] == 200  # it did not end


def test_a_post_without_an_origin_or_from_another_site_is_refused(server: PageServer) -> None:
    path = f"/{server.token}/end"
    assert _ask(server, path, "POST", b"{}", Content_Type="application/json")[0] == 403
    assert _post(server, "end", {}, Sec_Fetch_Site="cross-site")[0] == 403
    assert _post(server, "end", {}, Sec_Fetch_Site="same-site")[0] == 403
    assert _post(server, "end", {}, Content_Type="text/plain")[0] == 415
    assert _get(server, "worklist", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "page.js/../server.py",
        "..%2fserver.py",
        "page.js%00",
        "page.js?x=1",
        "./page.js",
        "/page.js",
        "PAGE.JS",
        "scans/-1",
        "scans/99",
        "scans/0/slices/3/0",
        "scans/0/slices/0/99999",
        "scans/0/slices/2/../0",
        "scans/٣",
        "scans/0/mask/",
        "records.jsonl",
    ],
)
def test_paths_that_the_page_does_not_ask_for_are_not_found(server: PageServer, path: str) -> None:
    request = f"GET /{server.token}/{path} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode()
    answer = _raw(server, request)
    assert answer.startswith(b"HTTP/1.0 404"), answer[:200]
    assert b"root:" not in answer
    assert b"Traceback" not in answer


def test_an_absolute_address_is_not_found(server: PageServer) -> None:
    request = f"GET http://evil.example/{server.token}/ HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
    assert _raw(server, request.encode()).startswith(b"HTTP/1.0 404")


def test_methods_that_the_page_does_not_use_are_refused(server: PageServer) -> None:
    for method, path in (("PUT", ""), ("DELETE", "scans/0"), ("OPTIONS", "end"), ("HEAD", ""), ("TRACE", "")):
        assert _ask(server, f"/{server.token}/{path}", method)[0] == 501
    assert _get(server, "scans/0/review")[0] == 405
    assert _post(server, "scans/0/mask", {})[0] == 405
    assert _get(server, "end")[0] == 404


def test_bodies_are_bounded_and_must_say_their_length(server: PageServer) -> None:
    head = (
        f"POST /{server.token}/scans/0/review HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        f"Origin: {server.origin}\r\nContent-Type: application/json\r\n"
    )
    for lines, status in (
        (f"Content-Length: {MOST_BODY + 1}\r\n", b"413"),
        ("", b"411"),
        ("Content-Length: -1\r\n", b"411"),
        ("Content-Length: 2\r\nContent-Length: 3\r\n", b"411"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"411"),
        ("Content-Length: 50\r\n", b"400"),  # and the connection ends before
    ):
        assert _raw(server, f"{head}{lines}\r\n{{}}".encode()).startswith(b"HTTP/1.0 " + status), lines


def test_long_lines_and_many_headers_are_refused(server: PageServer) -> None:
    assert b" 414 " in _raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")[:40]
    many = b"".join(b"X-%d: 1\r\n" % k for k in range(200))
    assert b" 431 " in _raw(server, b"GET / HTTP/1.1\r\n" + many + b"\r\n")[:40]


def test_a_request_that_stalls_is_given_up_and_holds_up_nobody(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Handler, "timeout", 0.5)
    monkeypatch.setattr(module, "REQUEST_S", 2.0)
    began = time.monotonic()
    stalled = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(module.MOST_CONNECTIONS - 1)]
    assert _get(server, "worklist")[0] == 200
    for connection in stalled:
        connection.settimeout(10)
        assert connection.recv(10) == b""
        connection.close()
    assert time.monotonic() - began < 10


def test_a_request_that_trickles_is_given_up(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_S", 1.0)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        while time.monotonic() - began < 20:
            try:
                connection.sendall(b"a")
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - began < 10


def test_more_connections_than_the_bound_are_closed(server: PageServer) -> None:
    held = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(module.MOST_CONNECTIONS)]
    time.sleep(0.5)
    with socket.create_connection(("127.0.0.1", server.server_port)) as one_more:
        one_more.settimeout(10)
        assert one_more.recv(10) == b""
    for connection in held:
        connection.close()
    time.sleep(0.5)
    assert _get(server, "worklist")[0] == 200


def test_a_scan_is_opened_with_its_slices_and_its_mask(server: PageServer, site: Path) -> None:
    listed = json.loads(_get(server, "worklist")[1])
    assert listed["classes"] == ["blob"]
    assert len(listed["scans"]) >= 3
    assert {"case", "doubt", "done", "classes"} == set(listed["scans"][0])
    about = json.loads(_get(server, "scans/1")[1])
    assert about["shape"] == [24, 24, 16]
    assert len(about["windows"]) == 3
    opened = reviewing(site).open(listed["scans"][1]["case"])
    view = View(opened.case, 0, PLAN.data.intensity, opened.mask)
    mask = decode(_get(server, "scans/1/mask")[1], (16, 24, 24), 1)
    assert np.array_equal(view.from_page(mask), opened.mask)
    for axis, size in ((0, 24 * 16), (1, 24 * 16), (2, 24 * 24)):
        content = _get(server, f"scans/1/slices/{axis}/3")[1]
        assert len(content) == 2 * size
        assert content == view.image_slice(axis, 3)


def test_a_correction_on_the_page_becomes_the_label(server: PageServer, site: Path) -> None:
    case = json.loads(_get(server, "worklist")[1])["scans"][0]["case"]
    mask = decode(_get(server, "scans/0/mask")[1], (16, 24, 24), 1)
    mask[3:7, 2:9, 1:5] = 1 - mask[3:7, 2:9, 1:5]
    content = {"ratings": {"blob": 3}, "minutes": 14.5, "mask": base64.b64encode(encode(mask)).decode()}
    assert _post(server, "scans/0/review", content) == (200, b'{"decision": "corrected"}')
    review = reviewing(site)
    record = review.store.records()[-1]
    assert (record.case, record.ratings, record.minutes, record.tool) == (case, {"blob": 3}, 14.5, "page")
    assert record.label is not None
    opened = reviewing(site, "another", second=True).open(case)
    kept, _ = read_mask(review.store.mask(record.label), opened.case, PLAN)
    view = View(opened.case, 0, PLAN.data.intensity, opened.mask)
    assert np.array_equal(view.to_page(kept), mask)
    assert json.loads(_get(server, "worklist")[1])["scans"][0]["done"] == "corrected"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ratings": {"blob": 5}}, "ratings.blob: Input should be less than or equal to 4"),
        ({"ratings": {}}, "ratings: "),
        ({"minutes": -1}, "minutes: Input should be greater than or equal to 0"),
        ({"minutes": "NaN"}, "minutes: "),
        ({"mask": "?"}, "the mask is not base64."),
        ({"mask": "AAAA"}, "bytes each; 3 bytes came"),
        ({"mask": base64.b64encode(encode(np.zeros(9, np.uint8))).decode()}, "have 9 voxels; the scan has 9216"),
        ({"mask": base64.b64encode(encode(np.full(9216, 2, np.uint8))).decode()}, "has the class 2; the plan has 1"),
        ({"path": "/etc/passwd"}, "path: Extra inputs are not permitted"),
        ({"file": "/etc/passwd"}, "file: Input should be 'nifti'"),
        ({"file": "nifti"}, "mask.nii.gz"),
    ],
)
def test_a_malformed_review_is_refused_with_a_sentence_and_keeps_nothing(
    server: PageServer, site: Path, change: dict[str, Any], says: str
) -> None:
    before = reviewing(site).store.records()
    status, content = _post(server, "scans/2/review", {"ratings": {"blob": 2}, "minutes": 1.0} | change)
    assert status == 409
    assert says in content.decode()
    assert reviewing(site).store.records() == before
    assert _post(server, "scans/2/review", [1])[0] == 409


def test_a_mask_goes_to_another_program_and_comes_back(server: PageServer, site: Path) -> None:
    status, content = _post(server, "scans/2/hand-over", {})
    assert status == 200
    folder = Path(json.loads(content)["folder"])
    assert {path.name for path in folder.iterdir()} == {"image-mr.nii.gz", "mask.nii.gz"}
    review = reviewing(site)
    opened = review.open(json.loads(_get(server, "worklist")[1])["scans"][2]["case"])
    import nibabel as nib

    image = nib.load(folder / "mask.nii.gz")
    drawn = np.asarray(image.dataobj).copy()
    drawn[1:4, 1:4, 1:4] = 1 - drawn[1:4, 1:4, 1:4]
    moved = image.affine.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(drawn, moved), folder / "mask.nii.gz")
    said = {"ratings": {"blob": 2}, "minutes": 5.0, "file": "nifti"}
    status, content = _post(server, "scans/2/review", said)
    assert status == 409
    assert b"does not lie on the image" in content
    nib.save(
        nib.Nifti1Image(drawn[::-1], image.affine @ np.diag([-1, 1, 1, 1]) + _shift(image, 23)), folder / "mask.nii.gz"
    )
    assert _post(server, "scans/2/review", said) == (200, b'{"decision": "corrected"}')
    record = review.store.records()[-1]
    assert record.label is not None
    assert record.tool == "nifti"
    assert np.array_equal(read_mask(review.store.mask(record.label), opened.case, PLAN)[0], drawn)
    assert not folder.exists()


def _shift(image: Any, voxels: int) -> np.ndarray:
    shift = np.zeros((4, 4))
    shift[:3, 3] = image.affine[:3, 0] * voxels
    return shift


def test_the_page_ends_the_command(site: Path) -> None:
    server = PageServer(Desk(reviewing(site), 10))
    thread = threading.Thread(target=server.serve_until_idle, args=(60.0,))
    thread.start()
    assert _post(server, "end", {}) == (200, b'{"ended": true}')
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.server_port), timeout=2)


def test_a_forgotten_page_ends_and_foreign_requests_do_not_keep_it_alive(site: Path) -> None:
    server = PageServer(Desk(reviewing(site), 10))
    thread = threading.Thread(target=server.serve_until_idle, args=(1.5,))
    thread.start()
    began = time.monotonic()
    while thread.is_alive() and time.monotonic() - began < 20:
        try:
            _ask(server, "/")
        except OSError:
            break
        time.sleep(0.2)
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - began < 15


def test_the_token_is_in_no_log(server: PageServer, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(0):
        _get(server, "worklist")
        _get(server, "scans/99")
        _raw(server, f"GET /{server.token}/ HTTP/9.9\r\n\r\n".encode())
    out = capfd.readouterr()
    assert server.token not in caplog.text + out.out + out.err


def test_an_error_of_the_program_tells_the_page_nothing(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Callable[..., None]:
        raise RuntimeError("patient Jane Doe")

    monkeypatch.setattr(Desk, "worklist", broken)
    assert _get(server, "worklist") == (500, b"It failed; see the log.")


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's scripts, is not installed")
def test_the_pages_own_scripts_draw_undo_hand_over_rate_keep_and_end(site: Path) -> None:
    server = PageServer(Desk(reviewing(site, "node"), 10))
    thread = threading.Thread(target=server.serve_until_idle, args=(120.0,))
    thread.start()
    script = Path(__file__).parent / "page_in_node.js"
    done = subprocess.run(
        ["node", str(script), str(module.PAGE), server.url], capture_output=True, text=True, timeout=100, check=False
    )
    thread.join(10)
    assert (done.returncode, thread.is_alive()) == (0, False), done.stderr
    found = json.loads(done.stdout)
    assert found["painted"] > found["before"] == found["undone"]
    assert found["where"].startswith("axial ")
    record = reviewing(site).store.records()[-1]
    assert (record.rater, record.case, record.ratings, record.minutes) == ("node", found["cases"][0], {"blob": 2}, 3.5)
    assert record.decision == "corrected"
    assert "mask.nii.gz" in found["exchange"] or found["exchange"] == ""  # the next scan has been opened
