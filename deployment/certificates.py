"""What both sides read of a certificate."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509

from semisam_core.errors import ConfigError


def expiry(certificate: Path) -> datetime.datetime:
    """Return when a PEM certificate expires, in UTC.

    Raises:
        ConfigError: the file is missing or not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate}: this certificate cannot be read ({error}).") from None
