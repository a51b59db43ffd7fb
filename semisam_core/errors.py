"""The errors that people are meant to read. Each message says what is wrong, where, and what is accepted."""

from __future__ import annotations


class SemiSAMError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(SemiSAMError, ValueError):
    """A plan or a site file that cannot be used. Raised before any work is done.

    It is a ValueError so that one raised inside a model's validator is reported with its file and key.
    """


class CaseError(SemiSAMError):
    """One scan that cannot be used. The case is quarantined and the site goes on."""


class WeightsError(SemiSAMError):
    """A file of model weights that is missing, altered or of another architecture."""
