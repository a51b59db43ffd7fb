"""Certificates: a site that holds ca.crt trusts this server under its own names, and no other server."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from deployment.lead.pki import expiry, write_certificates
from semisam_core.errors import ConfigError


def _load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def _verify(folder: Path, name: x509.DNSName | x509.IPAddress, authority: Path | None = None) -> None:
    store = Store([_load((authority or folder) / "ca.crt")])
    PolicyBuilder().store(store).build_server_verifier(name).verify(_load(folder / "server.crt"), [])


def test_the_server_certificate_verifies_with_the_authority_under_every_name(tmp_path: Path) -> None:
    write_certificates(tmp_path, "atrium", ["lead.example.org", "192.0.2.7"], 30)
    for name in ("lead.example.org", "localhost"):
        _verify(tmp_path, x509.DNSName(name))
    for address in ("192.0.2.7", "127.0.0.1", "::1"):
        _verify(tmp_path, x509.IPAddress(ipaddress.ip_address(address)))
    with pytest.raises(VerificationError):
        _verify(tmp_path, x509.DNSName("elsewhere.example.org"))


def test_another_studys_authority_does_not_verify_this_server(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        write_certificates(tmp_path / name, "atrium", [], 30)
    with pytest.raises(VerificationError):
        _verify(tmp_path / "ours", x509.DNSName("localhost"), authority=tmp_path / "theirs")


def test_a_tls_client_with_the_authority_connects(tmp_path: Path) -> None:
    write_certificates(tmp_path, "atrium", [], 30)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(10)
    thread = threading.Thread(target=lambda: server.wrap_socket(ours, server_side=True).close(), daemon=True)
    thread.start()
    with client.wrap_socket(theirs, server_hostname="localhost") as connection:
        assert connection.version() == "TLSv1.3"
    thread.join(10)


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    write_certificates(tmp_path / "tls", "atrium", [], 30)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "tls").iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    assert (tmp_path / "tls").stat().st_mode & 0o777 == 0o700


def test_certificates_expire_when_asked(tmp_path: Path) -> None:
    write_certificates(tmp_path, "atrium", [], 30)
    left = expiry(tmp_path / "server.crt") - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


@pytest.mark.parametrize("host", ["https://lead.example.org", "lead:8443", "lead example", "", "-lead"])
def test_an_invalid_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="host name"):
        write_certificates(tmp_path, "atrium", [host], 30)
