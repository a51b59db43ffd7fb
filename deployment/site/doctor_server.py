"""Checks of the connection to the server: name, TLS, certificates, clock, proxy and registration of the key."""

from __future__ import annotations

import datetime
import email.utils
import os
import ssl
import stat
import urllib.request
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deployment.certificates import expiry
from deployment.site.findings import Finding, fine, problem, warning
from deployment.site.lifecycle import running
from deployment.site.site_folder import SiteFolder
from semisam_core.errors import ConfigError

PATIENCE_S = 15.0
SOON = datetime.timedelta(days=21)
# The server accepts signatures from 5 s ahead of its clock to 305 s behind; HTTP dates have whole seconds.
AHEAD_S, BEHIND_S = 4.0, 300.0
AHEAD_WARN_S, BEHIND_WARN_S = 2.0, 10.0
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "http_proxy", "HTTP_PROXY")


def check_server(folder: SiteFolder, address: str, connect: bool) -> list[Finding]:
    """Check everything between this site and the server.

    Args:
        folder: the site's folder.
        address: the server's host:port.
        connect: whether to connect; otherwise only local files are checked.
    """
    findings = [_check_proxy(address), _check_authority(folder.ca_file), *_check_key_file(folder.private_key)]
    if not connect:
        return [*findings, warning("server", f"{address} was not contacted (--no-server).")]
    reached, there = _check_connection(folder.ca_file, address)
    return [*findings, *reached, _check_registered(folder, address) if there else _unknown_key()]


def _check_proxy(address: str) -> Finding:
    named = [name for name in PROXIES if os.environ.get(name)]
    host = address.rpartition(":")[0].strip("[]")
    if not named:
        return fine("proxy", "none is set in the environment; the site connects directly.")
    if urllib.request.proxy_bypass(host):
        return fine("proxy", f"{', '.join(named)} is set, and NO_PROXY exempts {host}.")
    return warning(
        "proxy",
        f"{', '.join(named)} is set, so the connection to {host} goes through that proxy, which must allow CONNECT and "
        "must not intercept TLS. If the server can be reached directly, add its host to NO_PROXY.",
    )


def _check_authority(path: Path) -> Finding:
    try:
        return _until("certificate authority", expiry(path))
    except ConfigError as error:
        return problem("certificate authority", f"{error} Take it from the invitation again.")


def _check_key_file(path: Path) -> list[Finding]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        return [problem("key", f"{path} cannot be read ({type(error).__name__}); restore it, or join again.")]
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return [problem("key", f"{path} is not an elliptic-curve key, which Flower needs.")]
    if mode & 0o077:
        return [problem("key", f"others on this machine can read {path}; chmod 600 {path}")]
    return [fine("key", "the private key exists and only its owner can read it.")]


def _check_connection(authority: Path, address: str) -> tuple[list[Finding], bool]:
    """Request the server's health as the SuperNode would; return the findings and whether it answered."""
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with (
            httpx.Client(verify=context, timeout=PATIENCE_S) as asks,
            asks.stream("GET", f"https://{address}/health") as answer,
        ):
            secured = answer.extensions["network_stream"].get_extra_info("ssl_object")
            ends = ssl.cert_time_to_seconds(secured.getpeercert()["notAfter"])
            date = answer.headers.get("date")
            answer.read()
    except (httpx.HTTPError, OSError, ssl.SSLError, httpx.InvalidURL) as error:
        return [problem("server", _unreachable(error, address))], False
    certificate = datetime.datetime.fromtimestamp(ends, datetime.UTC)
    found = [fine("server", f"{address} answers over TLS, with a certificate that the invitation's authority signed.")]
    return [*found, _until("server's certificate", certificate), _check_clock(date)], True


def _unreachable(error: Exception, address: str) -> str:
    said = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return (
            f"{address} presents a certificate not signed by the invitation's authority ({said}). It may be another "
            "server, a proxy that intercepts TLS, or the lead has new certificates and must send a new invitation."
        )
    if isinstance(error, httpx.ConnectTimeout | httpx.ReadTimeout):
        return f"{address} did not answer within {PATIENCE_S:g} s; ask your network team whether it may be reached."
    if isinstance(error, httpx.ProxyError):
        return f"the proxy does not let this site through to {address} ({said})."
    return f"{address} cannot be reached ({said}). Check the address, the server and this machine's firewall."


def _check_clock(date: str | None) -> Finding:
    try:
        theirs = email.utils.parsedate_to_datetime(date or "")
    except ValueError:
        return warning("clock", "the server does not send its time, so the clocks could not be compared.")
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=datetime.UTC)
    ahead = (datetime.datetime.now(datetime.UTC) - theirs).total_seconds()
    said = f"this machine is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server"
    remedy = "Synchronise this machine by NTP; the server refuses signatures whose time is too far off."
    if ahead > AHEAD_S or ahead < -BEHIND_S:
        return problem("clock", f"{said}. {remedy}")
    if ahead > AHEAD_WARN_S or ahead < -BEHIND_WARN_S:
        return warning("clock", f"{said}. {remedy}")
    return fine("clock", f"{said}.")


def _check_registered(folder: SiteFolder, address: str) -> Finding:
    """Find out whether the server knows the key, by activating and deactivating a node as a SuperNode does."""
    found = running(folder)
    if found is not None:
        if found.connected:
            return fine("registration", "the site is running and connected, so its key is registered.")
        return warning(
            "registration", f"the site is running but not connected; see {folder.running / 'supernode.log'}."
        )
    if folder.withdrawn_file.exists():
        return warning("registration", "not checked, since this site has withdrawn.")
    try:
        key = load_ssh_private_key(folder.private_key.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm):
        return _unknown_key()
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return _unknown_key()
    signs = NodeAuthHttpInterceptor(key, key.public_key())
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    try:
        with FleetHttpClient.from_server_address(
            address, False, str(folder.ca_file), interceptors=[version, signs]
        ) as client:
            node = client.ActivateNode(request).node_id
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        return problem(
            "registration",
            f"the server does not accept this site's key (status {error.response.status_code}). Send the lead "
            f"{folder.public_key} and ask for it to be registered. The clock must be right too.",
        )
    except SystemExit:  # Flower exits the process on incompatible versions
        return problem("registration", "the server does not accept this version of Flower; install the lead's version.")
    except (httpx.HTTPError, ValueError):
        return _unknown_key()
    return fine("registration", "the server knows this site's key.")


def _unknown_key() -> Finding:
    return warning("registration", "whether the lead has registered this site's key could not be checked.")


def _until(subject: str, ends: datetime.datetime) -> Finding:
    left = ends - datetime.datetime.now(datetime.UTC)
    said = f"valid until {ends:%Y-%m-%d}"
    if left < datetime.timedelta():
        return problem(subject, f"{said}, which is past. Ask the lead for a new invitation.")
    if left < SOON:
        return warning(subject, f"{said}, which is soon. Ask the lead for a new invitation in time.")
    return fine(subject, f"{said}.")
