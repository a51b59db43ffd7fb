"""Phantom hospitals: procedural 3D abdomens, imaged by different scanners, written as ordinary NIfTI files.

An organ is an ellipsoid whose surface is deformed by a few random waves. Organs vary between patients in position,
size, rotation, shape and signal. Signals overlap, neighbours touch, border voxels show partial volume, and the scanner
adds its bias field, noise, gain, contrast, voxel size and axes. All lengths are in millimetres, all coordinates RAS+.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from semisam_core.progress import ProgressCallback

Volume = NDArray[np.float32]

_EXTENT_MM = (206.0, 206.0, 128.0)


@dataclass(frozen=True)
class Scanner:
    """How one hospital's scanner images a patient.

    Attributes:
        spacing_mm: voxel size along right, anterior, superior.
        axes: the axes of its files, such as "RAS" or "PIL".
        gain: factor applied to every signal.
        offset: added to every signal.
        gamma: contrast exponent; 1 is linear.
        bias: relative amplitude of the slow inhomogeneity.
        noise: standard deviation of the noise; organs have signals of 0.3 to 0.9.
    """

    spacing_mm: tuple[float, float, float]
    axes: str
    gain: float
    offset: float
    gamma: float
    bias: float
    noise: float


@dataclass(frozen=True)
class _Organ:
    """Population mean of one organ. Later organs in `ORGANS` overwrite earlier ones."""

    name: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    signal: float


ORGANS = (
    _Organ("stomach", (-34.0, 26.0, 26.0), (30.0, 24.0, 30.0), 0.50),
    _Organ("spleen", (-62.0, -22.0, 18.0), (17.0, 24.0, 30.0), 0.66),
    _Organ("bowel", (-6.0, 32.0, -36.0), (52.0, 22.0, 22.0), 0.56),
    _Organ("liver", (40.0, 6.0, 16.0), (40.0, 44.0, 36.0), 0.69),
    _Organ("gallbladder", (24.0, 34.0, -14.0), (11.0, 12.0, 16.0), 0.42),
    _Organ("right-kidney", (42.0, -34.0, -26.0), (17.0, 16.0, 30.0), 0.70),
    _Organ("left-kidney", (-40.0, -34.0, -18.0), (17.0, 16.0, 30.0), 0.70),
    _Organ("aorta", (-8.0, -18.0, 0.0), (9.0, 9.0, 200.0), 0.74),
    _Organ("spine", (0.0, -46.0, 0.0), (18.0, 17.0, 200.0), 0.86),
)
ORGAN_NAMES = tuple(organ.name for organ in ORGANS)
LABELED_ORGANS = ("liver", *(name for name in ORGAN_NAMES if name != "liver"))  # values 1, 2, ... of the demo's labels
_BODY = _Organ("body", (0.0, 0.0, 0.0), (92.0, 70.0, 400.0), 0.48)

DEMO_SCANNERS = {
    "north": Scanner((3.2, 3.2, 4.0), "RAS", gain=900.0, offset=40.0, gamma=1.0, bias=0.25, noise=0.045),
    "south": Scanner((3.0, 3.0, 5.0), "LPS", gain=300.0, offset=0.0, gamma=1.35, bias=0.40, noise=0.060),
    "east": Scanner((3.6, 3.6, 3.6), "PIR", gain=2000.0, offset=-100.0, gamma=0.75, bias=0.30, noise=0.050),
}


def make_phantom(scanner: Scanner, seed: int) -> tuple[Volume, NDArray[np.uint8]]:
    """Return one patient's scan and organ map, both (H, W, D) in RAS+ order.

    Args:
        scanner: the scanner.
        seed: selects the patient; the same seed and scanner give the same voxels.

    Returns:
        The scan, float32, and the organ map: 0, or 1 + the organ's index in `ORGAN_NAMES`.
    """
    random = np.random.default_rng(seed)
    grid = _grid(scanner.spacing_mm)
    shift = random.normal(0.0, (5.0, 4.0, 7.0)).astype(np.float32)[:, None, None, None]
    patient = grid - shift
    softness = float(np.mean(scanner.spacing_mm))
    signal = np.zeros(grid.shape[1:], np.float32)
    organs = np.zeros(grid.shape[1:], np.uint8)
    body: Volume | None = None
    for index, organ in enumerate((_BODY, *ORGANS)):
        inside = _depth_mm(organ, patient, random)
        body = inside if body is None else body
        inside = np.minimum(inside, body)
        share = np.clip(0.5 + inside / softness, 0.0, 1.0)  # partial volume at the border
        level = organ.signal * (1.0 + random.normal(0.0, 0.06))
        signal += share * (level + _texture(random, signal.shape, 0.05) - signal)
        organs[inside > 0] = index
    signal = _acquire(signal, scanner, random)
    return signal.astype(np.float32), organs


def write_phantom_site(
    folder: Path,
    scanner: Scanner,
    cases: int,
    seed: int,
    prefix: str,
    target_organs: Sequence[str] = ("liver",),
    progress: ProgressCallback | None = None,
) -> None:
    """Write a hospital's scans and labels: images/<prefix>-00.nii.gz, labels/<prefix>-00.nii.gz and so on.

    Args:
        folder: created if missing; files of the same name are replaced.
        scanner: the hospital's scanner.
        cases: number of patients.
        seed: the hospital's seed; a patient depends on it and on the patient's number.
        prefix: start of the case names.
        target_organs: organs to label: the first with 1, the second with 2, and so on.
        progress: called with (patients done, patients).

    Raises:
        ValueError: an organ is unknown.
    """
    unknown = [name for name in target_organs if name not in ORGAN_NAMES]
    if unknown:
        raise ValueError(f"no organ is called {unknown}; accepted are {', '.join(ORGAN_NAMES)}")
    values = np.zeros(len(ORGANS) + 1, np.uint8)
    for value, name in enumerate(target_organs, start=1):
        values[1 + ORGAN_NAMES.index(name)] = value
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        scan, organs = make_phantom(scanner, int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        name = f"{prefix}-{number:02d}.nii.gz"
        _write(folder / "images" / name, np.rint(scan).astype(np.int16), scanner)
        _write(folder / "labels" / name, values[organs], scanner)
        if progress:
            progress(number + 1, cases)


def _grid(spacing: tuple[float, float, float]) -> Volume:
    """Return the RAS coordinates of voxel centres, (3, H, W, D), centred on the isocentre."""
    axes = []
    for extent, step in zip(_EXTENT_MM, spacing, strict=True):
        count = round(extent / step)
        axes.append((np.arange(count, dtype=np.float32) - (count - 1) / 2) * step)
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def _depth_mm(organ: _Organ, patient: Volume, random: np.random.Generator) -> Volume:
    """Return each point's depth in mm inside an organ (H, W, D), negative outside; exact near the border only."""
    radii = np.asarray(organ.radii, np.float32) * random.normal(1.0, 0.12) * random.normal(1.0, 0.08, 3)
    radii = np.maximum(radii, 0.6 * np.asarray(organ.radii))
    centre = np.asarray(organ.centre, np.float32) + random.normal(0.0, 4.0, 3)
    rotation = Rotation.from_euler("xyz", random.normal(0.0, 12.0 if organ.radii[2] < 100 else 2.0, 3), degrees=True)
    local = np.tensordot(rotation.as_matrix(), patient - centre[:, None, None, None], axes=1)
    scaled = local / radii[:, None, None, None]
    radius = np.sqrt((scaled**2).sum(0))
    wave = np.zeros_like(radius)
    for _ in range(4):
        direction = random.normal(0.0, 1.0, 3)
        direction *= random.uniform(1.5, 3.5) / np.linalg.norm(direction)
        wave += random.normal(0.0, 0.07) * np.sin(
            np.tensordot(direction, scaled, axes=1) + random.uniform(0, 2 * np.pi)
        )
    depth: Volume = ((1.0 + wave - radius) * float(np.min(radii))).astype(np.float32)
    return depth


def _texture(random: np.random.Generator, shape: tuple[int, ...], amplitude: float) -> Volume:
    rough = gaussian_filter(random.normal(0.0, 1.0, shape), 1.5)
    texture: Volume = (amplitude * rough / rough.std()).astype(np.float32)
    return texture


def _acquire(signal: Volume, scanner: Scanner, random: np.random.Generator) -> NDArray[Any]:
    slow = gaussian_filter(random.normal(0.0, 1.0, signal.shape), [side / 4 for side in signal.shape])
    bias = np.exp(scanner.bias * slow / np.abs(slow).max())
    contrast = np.clip(signal * bias, 0.0, None) ** scanner.gamma
    noisy = contrast + random.normal(0.0, scanner.noise, signal.shape)
    acquired: NDArray[Any] = noisy * scanner.gain * random.normal(1.0, 0.08) + scanner.offset
    return acquired


def _write(path: Path, volume: NDArray[Any], scanner: Scanner) -> None:
    """Write a RAS+ volume (H, W, D) with the axes of the scanner's files."""
    affine = np.diag([*scanner.spacing_mm, 1.0])
    affine[:3, 3] = [-(side - 1) / 2 * step for side, step in zip(volume.shape, scanner.spacing_mm, strict=True)]
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(scanner.axes)))
    turned = nib.orientations.apply_orientation(volume, change)
    image = nib.Nifti1Image(turned, affine @ inv_ornt_aff(change, volume.shape))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
