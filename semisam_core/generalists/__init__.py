"""Frozen promptable models that label scans, and the store that lets each scan be encoded once."""

from semisam_core.generalists.base import (
    Generalist,
    GeneralistCard,
    Point,
    PromptKind,
    Prompts,
    Segmentation,
    SliceBox,
    VolumeGrid,
)
from semisam_core.generalists.embedding_store import EmbeddingStore, scan_key
from semisam_core.generalists.registry import (
    GeneralistSpec,
    accepted_prompts,
    generalist_names,
    generalist_spec,
    load_generalist,
    register,
)

__all__ = [
    "EmbeddingStore",
    "Generalist",
    "GeneralistCard",
    "GeneralistSpec",
    "Point",
    "PromptKind",
    "Prompts",
    "Segmentation",
    "SliceBox",
    "VolumeGrid",
    "accepted_prompts",
    "generalist_names",
    "generalist_spec",
    "load_generalist",
    "register",
    "scan_key",
]
