"""From the specialist's probability for one class to prompts that a generalist takes, or the reason for none."""

from semisam_core.prompting.region import Refusal, Region, find_region, volume_refusal
from semisam_core.prompting.strategies import PromptRequest, Segment, answers_of, prompt_generalist

__all__ = [
    "PromptRequest",
    "Refusal",
    "Region",
    "Segment",
    "answers_of",
    "find_region",
    "prompt_generalist",
    "volume_refusal",
]
