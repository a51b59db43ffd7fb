"""Frozen promptable models that label scans, and the store that lets each scan be encoded once."""

from semisam_core.generalists.base import (
    Generalist,
    GeneralistCard,
    PromptKind,
    Prompts,
    Segmentation,
    SliceBox,
)
from semisam_core.generalists.embedding_store import EmbeddingStore, scan_key
from semisam_core.generalists.registry import (
    GeneralistSpec,
    accepted_prompts,
    generalist_names,
    load_generalist,
    register,
)

__all__ = [
    "EmbeddingStore",
    "Generalist",
    "GeneralistCard",
    "GeneralistSpec",
    "PromptKind",
    "Prompts",
    "Segmentation",
    "SliceBox",
    "accepted_prompts",
    "generalist_names",
    "load_generalist",
    "register",
    "scan_key",
]
