"""The configuration of a MONAI bundle that prepares scans and segments them as this project does, without it."""

from __future__ import annotations

from typing import Any

import monai
import numpy as np
import torch

from semisam_core.plan import Plan
from semisam_core.plan_sections.task import Data

SCRIPT = "models/model.ts"
WINDOWS = 2  # at a time, as in semisam_core/inference.py
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"


def inference(plan: Plan, windows: int = WINDOWS) -> dict[str, Any]:
    """Return `configs/inference.json`: `python -m monai.bundle run` segments every NIfTI file of `dataset_dir`.

    Args:
        plan: the study plan.
        windows: patches at a time.
    """
    files = "$sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    cases = "$[{'image': f} for f in @files]"
    if (channels := len(plan.task.channels)) > 1:
        # <case>_0000.nii.gz, <case>_0001.nii.gz, ... of one case follow each other
        cases = f"$[{{'image': @files[k:k + {channels}]}} for k in range(0, len(@files), {channels})]"
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/segmented'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "files": files,
        "cases": cases,
        "network_def": f"$torch.jit.load(@bundle_root + '/{SCRIPT}', map_location=@device)",
        "network": "$@network_def.to(@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": _before(plan)},
        "dataset": {"_target_": "Dataset", "data": "@cases", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(plan.data.patch),
            "sw_batch_size": windows,
            "overlap": plan.evaluation.overlap,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _after(plan)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def metadata(plan: Plan, name: str, description: str, version: str) -> dict[str, Any]:
    """Return `configs/metadata.json`, as MONAI's schema for bundles wants it."""
    channels, classes = plan.task.channels, plan.task.classes
    values = [0, 1] if plan.data.intensity.kind == "window" else [-10, 10]
    data = {"spatial_shape": list(plan.data.patch), "dtype": "float32", "is_patch_data": True}
    return {
        "schema": SCHEMA,
        "version": version,
        "changelog": {version: "exported"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.2", "pytorch-ignite": "0.5"},
        "name": name,
        "task": f"Segmentation of {', '.join(each.name for each in classes)} in {', '.join(channels)}",
        "description": description,
        "authors": "The sites of the study",
        "copyright": "See LICENSE and docs/README.md",
        "intended_use": "Research only. Not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": len(channels),
                    "value_range": values,
                    "channel_def": {str(k): each for k, each in enumerate(channels)},
                    **data,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": 1 + len(classes),
                    "value_range": [],
                    "channel_def": {"0": "background"} | {str(k): each.name for k, each in enumerate(classes, start=1)},
                    **data,
                }
            },
        },
    }


def _before(plan: Plan) -> list[dict[str, Any]]:
    data = plan.data
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "dtype": "float32"},
    ]
    if data.nan == "zero":
        steps.append({"_target_": "Lambdad", "keys": "image", "func": "$lambda x: torch.where(torch.isnan(x), 0, x)"})
    steps += [
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": "$(('L','R'),('P','A'),('I','S'))"},
        {
            "_target_": "Spacingd",
            "keys": "image",
            "pixdim": list(data.spacing_mm),
            "mode": "bilinear",
            "padding_mode": "border",
            "dtype": "$torch.float32",
        },
    ]
    return [*steps, *_normalise(data)]


def _normalise(data: Data) -> list[dict[str, Any]]:
    lower, upper = data.intensity.lower, data.intensity.upper
    if data.intensity.kind == "window":
        return [
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "image",
                **{"a_min": lower, "a_max": upper, "b_min": 0.0, "b_max": 1.0, "clip": True},
            }
        ]
    return [
        {
            "_target_": "ScaleIntensityRangePercentilesd",
            "keys": "image",
            **{"lower": lower, "upper": upper, "b_min": 0.0, "b_max": 1.0, "clip": True, "channel_wise": True},
        },
        {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True},
    ]


def _after(plan: Plan) -> list[dict[str, Any]]:
    classes = plan.task.classes
    steps: list[dict[str, Any]] = [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]
    if connected := [k for k, each in enumerate(classes, start=1) if each.connected]:
        steps.append(
            {
                "_target_": "KeepLargestConnectedComponentd",
                "keys": "pred",
                "applied_labels": connected,
                "is_onehot": False,
                "independent": True,
            }
        )
    values = [each.label_values[0] for each in classes]
    if values != list(range(1, 1 + len(classes))):
        steps.append(
            {
                "_target_": "MapLabelValued",
                "keys": "pred",
                "orig_labels": [0, *range(1, 1 + len(classes))],
                "target_labels": [0, *values],
            }
        )
    steps.append(
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "segmentation",
            "output_dtype": "$__import__('numpy').uint16" if max(values) > 255 else "$__import__('numpy').uint8",
            "resample": False,
            "separate_folder": False,
        }
    )
    return steps
