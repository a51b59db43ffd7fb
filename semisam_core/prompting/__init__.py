"""From the specialist's probability for one class to prompts that a generalist takes, or the reason for none."""

from semisam_core.prompting.region import Mask, Refusal, Region, find_region, meaningful_components, volume_refusal
from semisam_core.prompting.strategies import Ask, PromptRequest, consult

__all__ = [
    "Ask",
    "Mask",
    "PromptRequest",
    "Refusal",
    "Region",
    "consult",
    "find_region",
    "meaningful_components",
    "volume_refusal",
]
