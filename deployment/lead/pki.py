"""A study's own certificate authority and the server's certificate, by which sites authenticate the server."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from semisam_core.errors import ConfigError
from semisam_core.files import write_atomically

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.crt", "server.key"
ALWAYS = ("localhost", "127.0.0.1", "::1")  # for the lead's own commands
CLOCK_SKEW = datetime.timedelta(hours=1)
PRIVATE = 0o600
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,62})?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62})?)*")


@dataclass(frozen=True)
class _Signed:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, certificate: Path, key: Path) -> None:
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(key, pem, PRIVATE)
        write_atomically(certificate, self.certificate.public_bytes(Encoding.PEM))


def check_host(host: str) -> None:
    """Check that a host is a DNS name or an IP address.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(_general_name(host), x509.IPAddress) and not HOST_NAME.fullmatch(host):
        raise ConfigError(f"{host!r} is neither a host name nor an IP address; give it without scheme and port.")


def write_certificates(folder: Path, study: str, hosts: Sequence[str], valid_days: int) -> None:
    """Make a certificate authority, and a server certificate signed by it.

    Args:
        folder: where ca.crt, ca.key, server.crt and server.key go; keys are readable by their owner only.
        study: the study's name, which both certificates carry.
        hosts: names and addresses under which sites reach the server; the loopback ones are added.
        valid_days: the validity of both, in days.

    Raises:
        ConfigError: a host is neither a name nor an address.
    """
    for host in hosts:
        check_host(host)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = _authority(study, valid_days)
    authority.write(folder / CA_CERTIFICATE, folder / CA_KEY)
    _server(authority, study, hosts, valid_days).write(folder / SERVER_CERTIFICATE, folder / SERVER_KEY)


def expiry(certificate: Path) -> datetime.datetime:
    """Return when a certificate ends to be good, in UTC.

    Raises:
        ConfigError: the file is missing or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate}: this certificate cannot be read ({error}).") from None


def _authority(study: str, valid_days: int) -> _Signed:
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"{study} certificate authority")
    usage = _usage(signs_certificates=True)
    builder = _builder(name, name, key.public_key(), valid_days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _Signed(key, builder.add_extension(usage, critical=True).sign(key, hashes.SHA384()))


def _server(authority: _Signed, study: str, hosts: Sequence[str], valid_days: int) -> _Signed:
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys([*hosts, *ALWAYS])])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(_name(f"{study} server"), authority.certificate.subject, key.public_key(), valid_days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(issuer, critical=False)
    )
    return _Signed(key, builder.sign(authority.key, hashes.SHA384()))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid_days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        try:
            return x509.DNSName(host)
        except ValueError:
            raise ConfigError(f"{host!r} is not a host name; write international names in their xn-- form.") from None
