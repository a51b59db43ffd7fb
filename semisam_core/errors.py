"""Errors meant for people. Each message says what is wrong, where, and what is accepted."""

from __future__ import annotations


class SemiSAMError(Exception):
    """Base of the project's own errors."""


class ConfigError(SemiSAMError, ValueError):
    """A plan or a site file that cannot be used. Raised before any work starts.

    A ValueError, so that pydantic reports one raised inside a validator with its file and key.
    """


class CaseError(SemiSAMError):
    """A scan that cannot be used. The case is quarantined; the site continues with the others."""


class WeightsError(SemiSAMError):
    """A weights file that is missing, altered or from another architecture."""
