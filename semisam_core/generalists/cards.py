"""What a person must know of each generalist before letting it label scans; read without loading any."""

from __future__ import annotations

from semisam_core.generalists.base import GeneralistCard, PromptKind

LITE_MEDSAM = GeneralistCard(
    name="lite-medsam",
    prompt_kinds=frozenset({PromptKind.BOX_2D}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles; each slice: bilinear (antialiased) to 256 along its "
        "longer side, min-max to 0-1, zeros below and right to 256 x 256, three equal channels"
    ),
    licence="Apache-2.0",
    source="lite_medsam.pth of the LiteMedSAM branch of github.com/bowang-lab/MedSAM",
    training_data=(
        "Training set of the CVPR 2024 challenge 'Segment Anything in Medical Images on Laptop' "
        "(codabench.org/competitions/1847), distilled from MedSAM (Ma et al., Nature Communications 2024): CT, "
        "MR, X-ray, ultrasound, endoscopy, dermoscopy, fundus and other images of public collections. No list by "
        "scan is published.",
    ),
    overlaps=("any public challenge scan may be among them",),
)
