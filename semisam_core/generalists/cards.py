"""What a person should know about each generalist before letting it label scans. Reading a card loads no model.

The texts under `preprocessing` are part of the keys of stored embeddings: sites encode all scans again if one changes.
"""

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
        "MR, X-ray, ultrasound, endoscopy, dermoscopy, fundus and other images from public collections. No list of "
        "scans is published.",
    ),
    overlaps=("any public challenge scan may be in the training data",),
    feature_channels=256,
)

SAM = GeneralistCard(
    name="sam",
    prompt_kinds=frozenset({PromptKind.POINTS_2D, PromptKind.BOX_2D, PromptKind.MASK_2D}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles; each slice: min-max to 0-255, bilinear (antialiased) to the "
        "encoder's side (1024 as published) along its longer side, three equal channels, less SAM's pixel mean, over "
        "its standard deviation, then zeros below and right"
    ),
    licence="Apache-2.0",
    source=(
        "sam_vit_b_01ec64.pth (SHA-256 ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912), "
        "sam_vit_l_0b3195.pth (SHA-256 3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622) or "
        "sam_vit_h_4b8939.pth (SHA-256 a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e) of "
        "github.com/facebookresearch/segment-anything"
    ),
    training_data=(
        "SA-1B: 11 million licensed photographs with 1.1 billion masks (Kirillov et al., ICCV 2023). No medical "
        "collection is listed.",
    ),
    feature_channels=256,
)

MEDSAM = GeneralistCard(
    name="medsam",
    prompt_kinds=frozenset({PromptKind.BOX_2D}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles; each slice: bilinear (antialiased) to a square of the "
        "encoder's side (1024 as published) whatever its proportions, min-max to 0-1, three equal channels"
    ),
    licence="Apache-2.0",
    source=(
        "medsam_vit_b.pth (SHA-256 34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74) of "
        "github.com/bowang-lab/MedSAM"
    ),
    training_data=(
        "SAM ViT-B with image encoder and mask decoder fine-tuned on over a million (1,570,263 in the paper) pairs of "
        "images and masks from public collections (Ma et al., Nature Communications 2024): CT, MR, PET-CT, X-ray, "
        "mammography, OCT, ultrasound, dermoscopy, endoscopy, fundus, pathology; 80 % of each for training.",
        "Held out from training, by its supplementary tables: ACDC, CHAOS, HaN-Seg, QUBIQ, WORD, LNQ2023, "
        "StructSeg, HCC-TACE-Seg, Kvasir, IDRiD, PAPILA, GlaS.",
    ),
    overlaps=(
        "AbdomenCT-1K",
        "AMOS",
        "ATLAS R2.0",
        "autoPET",
        "BraTS",
        "CAMUS",
        "crossMoDA",
        "FeTA",
        "HECKTOR",
        "INSTANCE",
        "ISIC",
        "ISLES",
        "JSRT",
        "KiPA",
        "KiTS",
        "M&Ms",
        "Medical Segmentation Decathlon (heart, i.e. left atrium; prostate, colon, hepatic vessel, lung, pancreas, "
        "spleen)",
        "NCI-ISBI prostate",
        "PI-CAI",
        "PROMISE12",
        "REFUGE",
        "SegTHOR",
        "TotalSegmentator",
        "WMH",
    ),
    feature_channels=256,
)

_CUBES = (
    "v1: the scan less its minimum, so that background is 0; trilinear, without smoothing, to 1.5 mm voxels; cubes of "
    "128 voxels, starting every 32, zeros around; each cube: mean 0 and standard deviation 1 over its voxels above 0"
)
_CLICKS_AND_MASK = frozenset({PromptKind.POINTS_3D, PromptKind.MASK_3D})
_SA_MED3D = (
    "SA-Med3D-140K: 21,729 scans with 143,518 masks, from 70 public collections and (8,128 scans) from 24 hospitals "
    "(Wang et al., IEEE TNNLS 2025). Its masks are published.",
    "Training folders listed in the published code: AbdomenCT-1K, AMOS 2022, ATLAS 2, ATM 2022, BrainPTM "
    "2021, BraTS 2021, BTCV (abdomen, cervix), CAUSE07, COVID-19-20, COVID-19 CT scans, CT-ORG, CTPelvic1K, CTSpine1K, "
    "FeTA 2022, FLARE 2021, Head and Neck Auto-Segmentation Challenge, Heart Seg MRI, ISLES 2022, iSeg 2017, 2019 and "
    "cSeg 2022, KiPA 2022, LAScarQS 2022, LiTS, LNDb, Longitudinal MS Lesion, LUNA16, MM-WHS, MRBrainS 2013 and 2018, "
    "Medical Segmentation Decathlon (all tasks but liver), MSseg08, MESSEG, PROMISE12, Prostate MRI Segmentation "
    "Dataset, RibFrac 2020, SegTHOR, SLIVER07, StructSeg 2019, TotalSegmentator, VALDO, VESSEL12, WMH, WORD.",
)
_SAM_MED3D_OVERLAPS = (
    "AbdomenCT-1K",
    "AMOS",
    "ATLAS",
    "BraTS 2021 and earlier years, which it or the Decathlon includes",
    "BTCV",
    "FeTA",
    "FLARE 2021",
    "ISLES 2022",
    "KiPA",
    "Left Atrium 2018 (ASC, LA): not listed, but LAScarQS 2022 is, whose scans are also from the University of Utah",
    "LiTS",
    "Medical Segmentation Decathlon",
    "MM-WHS",
    "PROMISE12",
    "SegTHOR",
    "TotalSegmentator",
    "WMH",
    "WORD",
)

SAM_MED3D = GeneralistCard(
    name="sam-med3d",
    prompt_kinds=_CLICKS_AND_MASK,
    preprocessing=_CUBES,
    licence="Apache-2.0",
    source="sam_med3d.pth of github.com/uni-medical/SAM-Med3D",
    training_data=_SA_MED3D,
    overlaps=_SAM_MED3D_OVERLAPS,
    feature_channels=384,
    feature_dimensions=3,
)

SAM_MED3D_TURBO = GeneralistCard(
    name="sam-med3d-turbo",
    prompt_kinds=_CLICKS_AND_MASK,
    preprocessing=_CUBES,
    licence="Apache-2.0",
    source=(
        "sam_med3d_turbo.pth (SHA-256 899a46d04d3b70f723282ceb489149373558bf0aaba389a346f5ab57da5cdd3c) of "
        "github.com/uni-medical/SAM-Med3D, at Hugging Face blueyo0/SAM-Med3D"
    ),
    training_data=(
        *_SA_MED3D,
        "Then fine-tuned on 44 collections listed by its authors: AbdomenCT-1K, AMOS 2022, ATM 2022, BrainPTM, "
        "BrainTumour (Decathlon), BraTS 2020 and 2021, BTCV cervix, CAUSE07, CHAOS task 4, COSMOS 2022, COVID-19 CT "
        "scans, CT-ORG, CTPelvic1K, FLARE 2021 and 2022, Heart Seg MRI, ISLES 2015 (SISS, SPES), KiPA 2022, KiTS and "
        "KiTS 2021, LAScarQS 2022 (tasks 1 and 2), LiTS, MM-WHS, Decathlon (colon, hepatic vessel, liver, pancreas, "
        "prostate, spleen), Parse 2022, PROMISE09 and 12, Prostate MRI Segmentation Dataset, SegTHOR, SLIVER07, STACOM "
        "SLAWT, TotalSegmentator, VerSe 2019 and 2020, VESSEL12, WORD.",
    ),
    overlaps=(*_SAM_MED3D_OVERLAPS, "BraTS 2020", "CHAOS", "FLARE 2022", "ISLES 2015", "KiTS", "Parse 2022", "VerSe"),
    feature_channels=384,
    feature_dimensions=3,
)

SEGANYPET = GeneralistCard(
    name="seganypet",
    prompt_kinds=_CLICKS_AND_MASK,
    preprocessing=_CUBES,
    licence="none stated by its authors",
    source=(
        "seganypet_v1.pth, seganypet_v2.pth or seganypet_lesion.pth of github.com/YichiZhang98/SegAnyPET, at Hugging "
        "Face YichiZhang98/SegAnyPET"
    ),
    training_data=(
        "v1: PETS-5k, 5,731 whole-body PET scans (Zhang et al., ICCV 2025).",
        "v2: 11,041 whole-body PET scans with 59,831 masks, from AutoPET, UDPET and three private cohorts (Zhang et "
        "al., arXiv 2603.11627); lesion: v2 fine-tuned on lesions. Adapted from SAM-Med3D. No list of scans is "
        "published.",
    ),
    overlaps=("autoPET", "UDPET"),
    feature_channels=384,
    feature_dimensions=3,
)

VISTA3D = GeneralistCard(
    name="vista3d",
    prompt_kinds=frozenset({PromptKind.POINTS_3D}),
    preprocessing=(
        "v1: trilinear to 1.5 mm; the scan's 0.5-99.5 percentiles to 0-1, cut beyond (published for CT: -963.82 to "
        "1053.68 HU to 0-1, but scans are already normalised here); 128 x 128 x 128 crops every 32 voxels, zeros "
        "around a smaller scan; stored: image features behind the point head's first block, half resolution"
    ),
    licence=(
        "NVIDIA License (NCLS v1): research or evaluation only, not commercial. The copy named NV-Segment-CT is "
        "published under the NVIDIA Open Model License instead; the licence that came with the file applies"
    ),
    source=(
        "models/model.pt of the MONAI bundle vista3d (0.4.2 and later, MONAI 1.4 layout; github.com/Project-MONAI/"
        "model-zoo), or vista3d_pretrained_model/model.pt of nvidia/NV-Segment-CT. Not model_monai1.3.pt, whose "
        "layers have other names, and not NV-Segment-CTMR, whose point branch was not trained with the rest"
    ),
    training_data=(
        "11,454 CT volumes (He et al., CVPR 2025) with expert labels, pseudo-labels and supervoxels. The training "
        "code (github.com/Project-MONAI/VISTA) lists AbdomenCT-1K, AeroPath, AMOS22, Bone-NIH, BTCV abdomen and "
        "cervix, COVID-19, CRLM-CT, CT-ORG, CTPelvic1K-CLINIC, FLARE22, LIDC, Medical Segmentation Decathlon tasks 3 "
        "and 6 to 10, Multi-organ Abdominal CT, NLST, Pancreas-CT, StonyBrook-CT, TCIA colon, TotalSegmentator v1 and "
        "v2, VerSe. C4KC-KiTS, WORD and murine micro-CT are listed as external evaluation data. No MR.",
    ),
    overlaps=(
        "AbdomenCT-1K",
        "AMOS (CT)",
        "BTCV",
        "CT-ORG",
        "FLARE22",
        "KiTS (through AbdomenCT-1K)",
        "LiTS (as Medical Segmentation Decathlon liver; through AbdomenCT-1K)",
        "Medical Segmentation Decathlon (liver, lung, pancreas, hepatic vessel, spleen, colon)",
        "Pancreas-CT",
        "TotalSegmentator (CT)",
        "VerSe",
    ),
)

SAM2 = GeneralistCard(
    name="sam2",
    prompt_kinds=frozenset({PromptKind.POINTS_2D, PromptKind.BOX_2D, PromptKind.MASK_2D, PromptKind.PROPAGATED}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles, which become 0 and 1 on all slices alike; each slice: bilinear "
        "(antialiased) to 1024 x 1024 whatever its proportions, three equal channels, less ImageNet's mean, over its "
        "standard deviation"
    ),
    licence="Apache-2.0",
    source=(
        "sam2.1_hiera_tiny.pt, sam2.1_hiera_small.pt, sam2.1_hiera_base_plus.pt or sam2.1_hiera_large.pt, or the four "
        "of SAM 2 (sam2_hiera_tiny.pt and so on), of github.com/facebookresearch/sam2"
    ),
    training_data=(
        "SA-V (videos), SA-1B (photographs) and unpublished videos of Meta's; for some models also DAVIS, MOSE and "
        "YouTubeVOS (Ravi et al., ICLR 2025). No medical collection is listed.",
    ),
)

MEDSAM2 = GeneralistCard(
    name="medsam2",
    prompt_kinds=frozenset({PromptKind.BOX_2D, PromptKind.PROPAGATED}),
    preprocessing=(
        "v1: clip the scan to its 0.5-99.5 percentiles, which become 0 and 1 on all slices alike; each slice: bilinear "
        "(antialiased) to 512 x 512 whatever its proportions, three equal channels, less ImageNet's mean, over its "
        "standard deviation"
    ),
    licence="research and education only by its model card, which is also marked CC BY-SA 4.0; code Apache-2.0",
    source=(
        "MedSAM2_latest.pt (or MedSAM2_2411.pt, MedSAM2_CTLesion.pt, MedSAM2_MRI_LiverLesion.pt, MedSAM2_US_Heart.pt) "
        "of github.com/bowang-lab/MedSAM2, at Hugging Face wanglab/MedSAM2"
    ),
    training_data=(
        "SAM 2.1 tiny, fine-tuned as a whole on more than 455,000 3D image-mask pairs and 76,000 video frames from "
        "public collections, some annotated by its authors (Ma et al., arXiv 2504.03600): CT, MR, PET, ultrasound, "
        "endoscopy. No list of scans is published.",
        "Annotated by its authors with its help: DeepLesion, LLD-MMRI, LUNA25, RVENet.",
    ),
    # Those marked as training data in its authors' list of datasets (medsam-datasetlist.github.io).
    overlaps=(
        "AbdomenCT-1K",
        "AMOS",
        "autoPET",
        "BraTS",
        "COVID-19-20",
        "crossMoDA",
        "CT-ORG",
        "DeepLesion",
        "FLARE",
        "HCC-TACE-Seg",
        "ISLES 2022",
        "KiTS",
        "Medical Segmentation Decathlon (left atrium among them)",
        "NCI-ISBI prostate",
        "PROMISE12",
        "TotalSegmentator",
        "WMH",
        "any other public challenge scan may be in the training data",
    ),
)
