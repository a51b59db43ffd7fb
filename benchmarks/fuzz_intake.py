"""Hostile and damaged inputs for `semisam import` and for the headers that a site reads: how each is taken.

    python benchmarks/fuzz_intake.py --inputs 500 --json faults.json
    python benchmarks/fuzz_intake.py --minutes 10 --only dicom mha --seed 3

Each input is made by mutating a sound one, from a seed, the surface and a number: `--only <surface> --from <number>
--inputs 1` makes it again. It lies in a folder of its own, beside a secret file that nothing may read, and goes through
what the product runs: listing, conversion in its reading process, record and manifest; or the header checks of a site.
A process of this benchmark's own does that, within bounds of time and memory for each input.

An input is accepted, refused with a sentence, or a fault: another exception than the documented ones, a refusal without
a sentence, more time or memory than allowed, a file written or changed outside of the target, or something of the
secret, or of the patient, in what was written. Exits with 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RTStructureSetStorage
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from intake.candidates import Candidate, Listing, Source
from intake.choices import Choices
from intake.conversion import convert
from intake.dicom.series import describe
from intake.guards import Limits, Request, Worker, read_json
from intake.importing import Import
from intake.manifest import read_manifest
from semisam_core.data.nifti import check_memory, open_nifti
from semisam_core.data.patients import MANIFEST, read_patients
from semisam_core.errors import SemiSAMError

LIMITS = Limits(seconds=60.0, memory_bytes=1 << 30)  # of the product's reading process
START_SECONDS = 600.0  # on a busy machine
SECONDS, MEMORY_BYTES = 90.0, 1 << 30  # of the process that lists and records, beyond what it has at the start
SECRET = 29_137  # the voxels of the file that nothing may read
PATIENT = "MRN-4711"
NUMBERS = (0, -1, 1, 3, 7, 255, 32767, 32768, 65535, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 10**12, 10**30)
REALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-30, 1e-9, 1e30, -1e30, 1e308, 0.5, 1e6)
TEXTS = (
    *(
        "",
        " ",
        "../../x",
        "/etc/passwd",
        "..\\..\\x",
        "a/../../b",
        "\0",
        "%s%n",
        "x" * 5000,
        "9" * 5000,
        "\u202e\u0000x",
    ),
    *("[/b]", "[red]", "é", "1e999", "NaN", "LIST", "LOCAL", "../secret.raw", "secret.raw", "-"),
)

Rng = random.Random
Drive = Callable[[Worker], None]
_before: dict[int | None, float] = {}


@dataclass
class Sandbox:
    """The folders of one input: `source` to be imported into `out`; nothing else may change."""

    root: Path
    source: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.source, self.out = self.root / "in", self.root / "out"
        self.source.mkdir(parents=True)
        (self.root / "secret.raw").write_bytes(np.full(4096, SECRET, np.int16).tobytes())
        (self.root / "secret.nii.gz").write_bytes(gzip.compress(_nifti(np.full((8, 8, 8), SECRET, np.int16)), mtime=0))


# Mutations -----------------------------------------------------------------------------------------------------------


def _bytes(rng: Rng, content: bytes, first: int, last: int) -> bytes:
    """Change, insert, remove or cut off bytes between two places."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8, 20))):
        last = min(last, len(data))
        if last <= first:
            break
        at, kind = rng.randrange(first, last), rng.randrange(10)
        if kind < 5:
            data[at] = rng.randrange(256)
        elif kind < 8:
            packed = (
                struct.pack(rng.choice("<>") + "q", rng.choice(NUMBERS[:-2])) if rng.random() < 0.5 else b"\xff" * 8
            )
            width = rng.choice((2, 4, 8))
            data[at : at + width] = packed[:width]
        elif kind == 8:
            del data[at : at + rng.choice((1, 2, 16, 200))]
        else:
            data[at:at] = bytes(rng.choices(range(256), k=rng.choice((1, 4, 64))))
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.08 else bytes(data)


def _value(rng: Rng, deep: int = 3) -> Any:
    """Return any JSON value, odd ones more often."""
    kind = rng.randrange(9)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice(REALS)
    if kind == 5:
        return rng.choice((None, True, False))
    if deep and kind == 6:
        return [_value(rng, deep - 1) for _ in range(rng.randrange(4))]
    if deep and kind == 7:
        return {rng.choice(TEXTS): _value(rng, deep - 1) for _ in range(rng.randrange(4))}
    return rng.choice(("images/a.nii.gz", "./imagesTr/a.nii.gz", "../secret.nii.gz", "a" * 64, "0" * 64))


def _json_places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _json_places(inner)


def _json(rng: Rng, sound: Any) -> bytes:
    """Return a JSON text: the sound one with some values changed, removed or repeated, or a bomb."""
    kind = rng.randrange(20)
    if kind == 0:
        return _json_bomb(rng)
    changed = copy.deepcopy(sound)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_json_places(changed))
        if not places or rng.random() < 0.02:
            return json.dumps(_value(rng)).encode()
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = holder.pop(key)
            case 1:
                holder.append(holder[key])
            case _:
                holder[key] = _value(rng)
    text = json.dumps(changed).encode()
    return _bytes(rng, text, 0, len(text)) if kind < 4 else text


def _json_bomb(rng: Rng) -> bytes:
    n = rng.choice((40, 900, 1100, 100_000))
    return rng.choice(
        (
            b"[" * n,
            b"[" * n + b"]" * n,
            b'{"a":' * n + b"1" + b"}" * n,
            b'["]",' * n + b"1" + b"]" * n,
            b"9" * n,
            b'{"version": ' + b"1" * n + b', "cases": []}',
            b'"' + b'\\"' * n,
            b"[" + b"{}," * n + b"{}]",
            b'{"training": [' + b'{"image": "a"},' * min(n, 3000) + b"1]}",
            b'"\\ud800"',
            b"\xff\xfe[]",
            b"NaN",
            b"",
        )
    )


def _bomb(rng: Rng, head: bytes, megabytes: int) -> bytes:
    """Return a gzip file of a head and zeros."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1, mtime=0) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(bytes(1 << 20))
    return packed.getvalue()


# NIfTI ---------------------------------------------------------------------------------------------------------------


def _nifti(voxels: Any, kind: Any = nib.Nifti1Image) -> bytes:
    image = kind(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


_FIELDS = {  # NIfTI-1: offset, format
    **{f"dim{k}": (40 + 2 * k, "<h") for k in range(8)},
    **{f"pixdim{k}": (76 + 4 * k, "<f") for k in range(8)},
    **{f"srow{k}": (280 + 4 * k, "<f") for k in range(12)},
    **{
        "datatype": (70, "<h"),
        "bitpix": (72, "<h"),
        "vox_offset": (108, "<f"),
        "slope": (112, "<f"),
        "inter": (116, "<f"),
    },
    **{"qform": (252, "<h"), "sform": (254, "<h"), "units": (123, "<b"), "sizeof": (0, "<i"), "extension": (352, "<i")},
}


def _nifti_bytes(rng: Rng) -> bytes:
    kind = nib.Nifti2Image if rng.random() < 0.2 else nib.Nifti1Image
    shape = rng.choice(((8, 9, 10), (8, 9, 10), (6, 6, 6, 1), (6, 6, 6, 2), (5, 5), (4, 4, 4)))
    data = bytearray(
        _nifti(np.arange(int(np.prod(shape)), dtype=rng.choice((np.int16, np.float32))).reshape(shape), kind)
    )
    if rng.random() < 0.7:
        for name in rng.sample(sorted(_FIELDS), rng.choice((1, 1, 2, 4))):
            at, form = _FIELDS[name]
            with contextlib.suppress(struct.error, OverflowError):
                data[at : at + struct.calcsize(form)] = struct.pack(
                    form, rng.choice(REALS) if form == "<f" else rng.choice(NUMBERS)
                )
        if rng.random() < 0.2:
            data[348] = 1
    else:
        data[:] = _bytes(rng, bytes(data), 0, 544)
    return bytes(data)


def _write_nifti(rng: Rng, folder: Path, name: str) -> Path:
    content = _nifti_bytes(rng)
    if rng.random() < 0.5:
        path = folder / f"{name}.nii"
        path.write_bytes(content)
        return path
    path = folder / f"{name}.nii.gz"
    packed = _bomb(rng, content, rng.choice((30, 200))) if rng.random() < 0.04 else gzip.compress(content, mtime=0)
    path.write_bytes(_bytes(rng, packed, 0, len(packed)) if rng.random() < 0.1 else packed)
    return path


def nifti(rng: Rng, box: Sandbox) -> Drive:
    """Import a NIfTI image with a label."""
    _write_nifti(rng, box.source, "a")
    if rng.random() < 0.5:
        (box.source / "labels").mkdir()
        _write_nifti(rng, box.source / "labels", "a")
    return _importing(box)


def nifti_header(rng: Rng, box: Sandbox) -> Drive:
    """Open a NIfTI file as a site does."""
    path = _write_nifti(rng, box.source, "a")

    def drive(_: Worker) -> None:
        file = open_nifti(path, "a", "image")
        check_memory("a", [file.geometry], (1.0, 1.0, 1.0), 0.2)
        file.voxels()

    return drive


# NRRD and MetaImage --------------------------------------------------------------------------------------------------

_NRRD = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 8\nspace directions: (2,0,0) (0,2,0) (0,0,2)\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n"  # fmt: skip # noqa: E501
_META = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 2 2 2\nDimSize = 8 8 8\nElementType = MET_SHORT\n"  # fmt: skip # noqa: E501


def _header_text(rng: Rng, lines: list[str], mark: str, data_line: str) -> bytes:
    lines = [*lines, data_line]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        key, separator, value = lines[at].partition(mark)
        match rng.randrange(9):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))] if lines else "")
            case 2:
                lines.insert(
                    at, rng.choice(("", " ", "# note", "Comment = x", "junk", "a:=b", "\r", "\0", f"x = {data_line}"))
                )
            case 3 if value.split():
                parts = value.split()
                parts[rng.randrange(len(parts))] = str(rng.choice((*NUMBERS, *REALS)))
                lines[at] = f"{key}{separator} {' '.join(parts)}"
            case 4:
                lines[at] = key + rng.choice((":", "=", " = ", "\t:\t", ": ", ":=")) + value.strip()
            case 5:
                lines[at] = (
                    rng.choice((key.upper(), key.lower(), " " + key, key + " ", key.replace(" ", "")))
                    + separator
                    + value
                )
            case 6:
                lines[at:at] = [rng.choice(("# x", "Comment = x", "", "c:=x"))] * rng.choice((10, 9000, 200_000))
            case _:
                lines[at] = f"{key}{separator} {rng.choice(TEXTS)}"
        if not lines:
            lines = [data_line]
    return (rng.choice(("\n", "\n", "\n", "\r\n", "\r")).join(lines) + "\n").encode("utf-8", "replace")


def _itk(rng: Rng, box: Sandbox, suffixes: tuple[str, str], sound: str, mark: str, key: str) -> Drive:
    suffix = rng.choice(suffixes)
    voxels = np.arange(512, dtype=np.int16).tobytes()
    attached = suffix in (".nrrd", ".mha")
    names = [
        "../secret.raw",
        str(box.root / "secret.raw"),
        "x.raw",
        "LIST",
        "LOCAL",
        "%d.raw",
        "link.raw",
        "x.raw",
        "x.raw",
    ]
    named = f"{key}{mark} {rng.choice(names)}" if not attached or rng.random() < 0.3 else f"{key}{mark} LOCAL"
    if attached and suffix == ".nrrd" and named.endswith("LOCAL"):
        named = "comment:=x"
    head = _header_text(rng, sound.splitlines(), mark, named)
    content = head + (b"\n" if suffix == ".nrrd" else b"") + (voxels if attached else b"")
    if rng.random() < 0.15:
        content = _bytes(rng, content, 0, len(head))
    (box.source / f"a{suffix}").write_bytes(content)
    (box.source / "x.raw").write_bytes(voxels)
    (box.source / "link.raw").symlink_to(box.root / "secret.raw")
    return _importing(box)


def nrrd(rng: Rng, box: Sandbox) -> Drive:
    """Import a NRRD file, attached or detached."""
    return _itk(rng, box, (".nrrd", ".nhdr"), _NRRD, ":", "data file")


def metaimage(rng: Rng, box: Sandbox) -> Drive:
    """Import a MetaImage file, attached or detached."""
    return _itk(rng, box, (".mha", ".mhd"), _META, "=", "ElementDataFile ")


# DICOM ---------------------------------------------------------------------------------------------------------------


def _file(uid: str, number: str, modality: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid, number
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = uid, number, modality
    dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = PATIENT, "Muster^Erika", "19420101"
    dataset.PatientSex, dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "F", "20240101", "101010", "A1"
    dataset.StudyID, dataset.ReferringPhysicianName, dataset.SeriesNumber = "1", "", 1
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.9"
    return dataset


def _ct(k: int) -> FileDataset:
    dataset = _file(CTImageStorage, f"1.2.3.4.{k + 1}", "CT")
    dataset.SeriesDescription, dataset.ImageType = "Thorax 3.0", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImageOrientationPatient, dataset.PixelSpacing, dataset.SliceThickness = [1, 0, 0, 0, 1, 0], [2.0, 1.5], 3.0
    dataset.ImagePositionPatient, dataset.PositionReferenceIndicator = [10.0, -20.0, 3.0 * k], ""
    dataset.InstanceNumber, dataset.AcquisitionNumber, dataset.EchoTime = k + 1, 1, 2.5
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 12, 10, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    dataset.PixelData = (np.arange(120, dtype=np.int16) + 120 * k).tobytes()
    return dataset


def _with(**tags: Any) -> Dataset:
    dataset = Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def _rtstruct() -> FileDataset:
    dataset = _file(RTStructureSetStorage, "1.2.5", "RTSTRUCT")
    del dataset.FrameOfReferenceUID
    dataset.SeriesInstanceUID = "1.2.5.1"
    ring = [13.0, -16.0, 6.0, 20.0, -16.0, 6.0, 20.0, -6.0, 6.0, 13.0, -6.0, 6.0]
    contour = _with(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=ring)
    dataset.StructureSetROISequence = [_with(ROINumber=1, ROIName="Liver"), _with(ROINumber=2, ROIName="Spleen")]
    dataset.ROIContourSequence = [_with(ReferencedROINumber=1, ContourSequence=[contour])]
    study = _with(RTReferencedSeriesSequence=[_with(SeriesInstanceUID="1.2.3.4")])
    dataset.ReferencedFrameOfReferenceSequence = [_with(FrameOfReferenceUID="1.2.9", RTReferencedStudySequence=[study])]
    return dataset


def _written(dataset: Any) -> bytes:
    packed = io.BytesIO()
    dataset.save_as(packed, enforce_file_format=True)
    return packed.getvalue()


@cache
def _sound_dicom() -> dict[str, bytes]:
    """Return a series of six slices, and a SEG, an RTSTRUCT and a multi-frame image of it."""
    slices = [pydicom.dcmread(io.BytesIO(_written(_ct(k)))) for k in range(6)]
    mask = np.zeros((6, 12, 10), dtype=np.uint8)
    mask[1:3, 2:5, 3:6] = 1
    kind = hd.seg.SegmentAlgorithmTypeValues.MANUAL
    segment = hd.seg.SegmentDescription(1, "Liver", codes.SCT.AnatomicalStructure, codes.SCT.Liver, kind)
    binary = hd.seg.SegmentationTypeValues.BINARY
    seg = hd.seg.Segmentation(slices, mask, binary, [segment], "1.2.6", 2, "1.2.6.1", 1, "m", "n", "1", "x")
    frames = hd.legacy.LegacyConvertedEnhancedCTImage(slices, "1.2.8", 1, "1.2.8.1", 1)
    named = {"seg": seg, "rtstruct": _rtstruct(), "frames": frames}
    return {f"IM{k}": _written(each) for k, each in enumerate(slices)} | {k: _written(v) for k, v in named.items()}


def _tags(rng: Rng, content: bytes) -> bytes:
    """Give some tags, also in sequences, odd values; what cannot be written stays as it was."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    for _ in range(rng.choice((1, 1, 2, 5))):
        element = rng.choice([each for each in dataset.iterall() if each.keyword != "PixelData"])
        with contextlib.suppress(Exception):
            match rng.randrange(4):
                case 0:
                    element.value = None
                case 1 if element.VM > 1:
                    values = list(element.value)
                    values[rng.randrange(len(values))] = rng.choice((*NUMBERS[:9], 1e300, -1e30, 0.0))
                    element.value = values
                case 2:
                    element.value = [element.value] * rng.choice((0, 2, 3, 500))
                case _:
                    element.value = rng.choice((*NUMBERS, *REALS, *TEXTS))
    with contextlib.suppress(Exception):
        return _written(dataset)
    return _bytes(rng, content, 128, len(content))


def _dicom_bytes(rng: Rng, content: bytes) -> bytes:
    kind = rng.randrange(20)
    if kind < 9:
        return _tags(rng, content)
    if kind < 17:
        return _bytes(rng, content, rng.choice((0, 128, 132)), len(content) - rng.choice((0, 240)))
    if kind == 17:
        return _vr(rng, content)
    if kind == 18:
        depth = rng.choice((50, 400, 20_000))
        opened = struct.pack("<HH2sHI", 0x0008, 0x1115, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
            "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
        )
        at = content.index(b"\x08\x00\x60\x00CS")
        return content[:at] + opened * depth + content[at:]
    return _deflated(rng, content)


def _vr(rng: Rng, content: bytes) -> bytes:
    """Exchange the kind of value that a tag claims to have."""
    kinds = (b"SQ", b"UN", b"OB", b"IS", b"DS", b"US", b"FD", b"LO", b"UI", b"AT", b"??")
    places = [k for k in range(132, len(content) - 2) if content[k : k + 2] in kinds]
    for at in rng.sample(places, min(len(places), rng.choice((1, 3)))):
        content = content[:at] + rng.choice(kinds) + content[at + 2 :]
    return content


def _deflated(rng: Rng, content: bytes) -> bytes:
    start = 144 + struct.unpack("<I", content[140:144])[0]
    head = content[:start].replace(ExplicitVRLittleEndian.encode() + b"\0", DeflatedExplicitVRLittleEndian.encode())
    head = head[:140] + struct.pack("<I", struct.unpack("<I", head[140:144])[0] + len(head) - start) + head[144:]
    stream = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = stream.compress(struct.pack("<HH2sHI", 0x0007, 0x1001, b"OB", 0, 400 << 20))
    body += b"".join(stream.compress(bytes(1 << 20)) for _ in range(rng.choice((1, 400))))
    return head + body + stream.compress(content[start:]) + stream.flush()


def dicom(rng: Rng, box: Sandbox) -> Drive:
    """Import a series with a label, one or more of whose files are damaged, or missing, or there twice."""
    sound = _sound_dicom()
    files = {name: content for name, content in sound.items() if name.startswith("IM")}
    label = rng.choice(("seg", "rtstruct", ""))
    if label:
        files[label] = sound[label]
    chosen = rng.sample(sorted(files), rng.choice((1, 1, 2))) if not label or rng.random() < 0.5 else [label]
    for name in chosen:
        files[name] = _dicom_bytes(rng, files[name])
    if rng.random() < 0.2:
        every = rng.choice(
            ("PixelSpacing", "ImageOrientationPatient", "Rows", "PatientID", "SeriesInstanceUID", "SeriesDescription")
        )
        odd = rng.choice((*TEXTS, *NUMBERS[:10], [1e-9, 1e-9], [1, 0, 0, 0, 0, 1], [0, 1, 0, 1e-3, 0, 1]))
        for name in [name for name in files if name.startswith("IM")]:
            with contextlib.suppress(Exception):
                dataset = pydicom.dcmread(io.BytesIO(files[name]))
                setattr(dataset, every, odd)
                files[name] = _written(dataset)
    if rng.random() < 0.15:
        files["copy"] = files.pop(rng.choice(sorted(files))) if rng.random() < 0.5 else files[rng.choice(sorted(files))]
    for name, content in files.items():
        (box.source / name).write_bytes(content)
    if rng.random() < 0.05:
        (box.source / "link").symlink_to(
            rng.choice((box.root / "secret.nii.gz", Path("/dev/zero"), box.source, Path("link")))
        )
    if rng.random() < 0.03:
        os.mkfifo(box.source / "pipe")
    return _importing(box, "dicom")


def multiframe(rng: Rng, box: Sandbox) -> Drive:
    """Judge and import a damaged multi-frame image, as the listing does."""
    path = box.source / "frames"
    path.write_bytes(_dicom_bytes(rng, _sound_dicom()["frames"]))
    source = Source(kind="dicom", paths=(str(path),), series="1.2.8")
    candidate = Candidate(patient=PATIENT, scan="x", channels=(source,))

    def drive(worker: Worker) -> None:
        worker.call({"files": [str(path)]})
        _outcome(box, worker, _choices(), [candidate])

    return drive


# Layouts, manifests, h5 ----------------------------------------------------------------------------------------------

_RECORD = {"file": "images/a.nii.gz", "sha256": "0" * 64, "modality": "CT", "series": "0" * 64, "shape": [8, 8, 8], "spacing_mm": [1.0, 1.0, 1.0]}  # fmt: skip # noqa: E501
_CASE = {"case": "p1-a", "patient": "p1", "channels": [_RECORD], "label": {"file": "labels/a.nii.gz", "sha256": "0" * 64, "classes": {"1": "liver"}}, "source": "0" * 64, "settings": "0" * 64}  # fmt: skip # noqa: E501
_MANIFEST = {
    "version": 1,
    "cases": [_CASE, _CASE | {"case": "p2-a", "channels": [_RECORD | {"file": "images/b.nii.gz"}]}],
}
_PAIRS = [
    {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"},
    {"image": "./imagesTr/b.nii.gz", "label": "x"},
]
_DECATHLON = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": _PAIRS, "test": ["./imagesTs/c.nii.gz"]}  # fmt: skip # noqa: E501
_NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def manifest(rng: Rng, box: Sandbox) -> Drive:
    """Read a manifest, strictly as its folder's owner does and loosely as a split does."""
    path = box.source / MANIFEST
    path.write_bytes(_json(rng, _MANIFEST))

    def drive(_: Worker) -> None:
        refused: SemiSAMError | None = None
        for reader in (read_manifest, lambda file: read_patients(file.parent / "images"), read_json):
            try:
                reader(path)
            except SemiSAMError as error:
                refused = error
        if refused is not None:
            raise refused

    return drive


def layouts(rng: Rng, box: Sandbox) -> Drive:
    """Import a dataset whose description, names or links are odd."""
    kind = rng.choice(("decathlon", "nnunet", "bids", "paired"))
    content = gzip.compress(_nifti(np.arange(512, dtype=np.int16).reshape(8, 8, 8)), mtime=0)
    folder = box.source / {"bids": "sub-1/anat", "paired": "images"}.get(kind, "imagesTr")
    labels = box.source / {"bids": "derivatives/x/sub-1", "paired": "labels"}.get(kind, "labelsTr")
    stem = rng.choice(
        ("a", "a", "a_0000", "a b", "[red]", "sub-1_T1w", "sub-1_" + "x" * 150, "..", "a%s", "é", "\udcff")
    )
    for at in (folder, labels):
        at.mkdir(parents=True)
        name = f"{stem}_dseg" if at is labels and kind == "bids" else stem
        (at / f"{name}.nii.gz").write_bytes(content)
    if kind in ("decathlon", "nnunet"):
        (box.source / "dataset.json").write_bytes(_json(rng, _DECATHLON if kind == "decathlon" else _NNUNET))
    if rng.random() < 0.3:
        (folder / "z.nii.gz").symlink_to(
            rng.choice((box.root / "secret.nii.gz", Path("/dev/zero"), Path("z.nii.gz"), folder))
        )
    if rng.random() < 0.1:
        shutil.rmtree(folder)
        (box.root / "secret").mkdir()
        shutil.copy(box.root / "secret.nii.gz", box.root / "secret" / "a.nii.gz")
        folder.symlink_to(box.root / "secret")
    return _importing(box, rng.choice(("auto", kind)))


def h5(rng: Rng, box: Sandbox) -> Drive:
    """Import an h5 release with odd datasets, or damaged bytes."""
    path = box.source / "a.h5"
    with h5py.File(box.root / "secret.h5", "w") as file:
        file["image"] = np.full((8, 8, 8), SECRET, np.int16)
    shape = rng.choice(
        ((8, 8, 8), (8, 8, 8), (8, 8), (0, 8, 8), (1, 8, 8, 8), (10_000, 10_000, 10_000), (10**6, 10**3, 10**3))
    )
    with h5py.File(path, "w") as file:
        match rng.randrange(7):
            case 0:
                file["image"] = h5py.ExternalLink(str(box.root / "secret.h5"), "image")
            case 1:
                layout = h5py.VirtualLayout((8, 8, 8), "i2")
                layout[:] = h5py.VirtualSource(str(box.root / "secret.h5"), "image", (8, 8, 8))
                file.create_virtual_dataset("image", layout)
            case 2:
                external = [(str(box.root / "secret.raw"), 0, 1024)]
                file.create_dataset("image", (8, 8, 8), "i2", external=external)
            case 3:
                file.create_dataset(
                    "image",
                    shape,
                    rng.choice(("f8", "i8", "u1", "?", "c8", "S9", "f2")),
                    chunks=True,
                    compression="gzip",
                )
            case 4:
                file["image"] = h5py.SoftLink(rng.choice(("/image", "/other", "/")))
                file["other"] = np.zeros((8, 8, 8))
            case _:
                file["image"] = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
        with contextlib.suppress(ValueError):
            file.create_dataset("label", shape, "u1", chunks=True, compression="gzip")
    if rng.random() < 0.5:
        content = path.read_bytes()
        path.write_bytes(_bytes(rng, content, 0, len(content)))
    return _importing(box, "h5", spacing="1,1,1")


SURFACES: dict[str, Callable[[Rng, Sandbox], Drive]] = {
    "nifti": nifti,
    "nifti-header": nifti_header,
    "nrrd": nrrd,
    "metaimage": metaimage,
    "dicom": dicom,
    "multiframe": multiframe,
    "h5": h5,
    "layouts": layouts,
    "manifest": manifest,
}


# Running -------------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """All of an input was left out; the message is the first reason."""


class Fault(Exception):
    """What must never happen."""


def read(request: Request) -> dict[str, Any]:
    """What the product's reading processes do: convert a scan, or describe a multi-frame image."""
    return describe(request) if "files" in request else convert(request)


def _choices(**changes: Any) -> Choices:
    usual: dict[str, Any] = {"plan": None, "classes": None, "channels": [], "spacing": None, "partial_labels": "refuse"}
    return Choices.of(**(usual | {"patient": None, "labels": None, "key": None} | changes))


def _importing(box: Sandbox, layout: str = "auto", **changes: Any) -> Drive:
    def drive(worker: Worker) -> None:
        choices = _choices(**changes)
        listing = choices.find(box.source, layout)
        _outcome(box, worker, choices, listing.candidates, [reason for _, reason in listing.left_out])

    return drive


def _outcome(
    box: Sandbox, worker: Worker, choices: Choices, candidates: Sequence[Candidate], left_out: Sequence[str] = ()
) -> None:
    outcomes = Import(box.out, choices.settings, LIMITS).run(Listing(tuple(candidates)), worker=worker)
    read_manifest(box.out / MANIFEST)
    failed = [each.remarks[-1] for each in outcomes if each.state == "failed"]
    if any(len(sentence) < 10 for sentence in (*failed, *left_out)):
        raise Fault(f"no sentence: {failed} {left_out}")
    if len(failed) == len(outcomes):
        raise Refused(next(iter((*failed, *left_out)), "Nothing here can be taken."))


def _snapshot(root: Path, apart: Path) -> dict[str, Any]:
    """Return type, size, times and links of all files below a folder but for those in `apart`."""
    found = {}
    for path in root.rglob("*"):
        if not path.is_relative_to(apart):
            status = path.lstat()
            found[os.fsdecode(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _leaks(out: Path) -> list[str]:
    """Return what was written of the secret, or of the patient outside of the private folder."""
    found = []
    for path in out.rglob("*"):
        if not path.is_file() or "private" in path.relative_to(out).parts:
            continue
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        if np.int16(SECRET).tobytes() * 4 in content or np.float32(SECRET).tobytes() * 4 in content:
            found.append(f"the secret in {path.name}")
        found += [f"{word} in {path.name}" for word in (PATIENT, "Muster", "19420101") if word.encode() in content]
    return found


def _grown_mb(pid: int | None) -> float:
    """Return by how much a process has grown at most since this was last called for it."""
    try:
        peak = _resident_mb(pid, "VmHWM:")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted anew
        before, _before[pid] = _before.get(pid), _resident_mb(pid, "VmRSS:")
    except (OSError, IndexError):
        return 0.0
    return 0.0 if before is None else peak - before


def _resident_mb(pid: int | None, what: str) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split(what)[1].split()[0]) / 1024


def _serve(line: Connection, folder: str) -> None:
    """Try inputs until the parent closes the line."""
    warnings.simplefilter("ignore")
    logging.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    _sound_dicom()
    with Worker(read, LIMITS) as worker:
        with contextlib.suppress(SemiSAMError):
            worker.call({"files": []})  # starts it
        has = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (has + MEMORY_BYTES, resource.RLIM_INFINITY))
        line.send(None)
        while True:
            try:
                surface, seed, number = line.recv()
            except EOFError:
                return
            line.send(_tried(surface, seed, number, Path(folder), worker))


def _tried(surface: str, seed: int, number: int, folder: Path, worker: Worker) -> dict[str, Any]:
    root = folder / f"{surface}-{number}"
    shutil.rmtree(root, ignore_errors=True)
    box = Sandbox(root)
    drive = SURFACES[surface](random.Random(f"{seed}/{surface}/{number}"), box)
    before, start = _snapshot(root, box.out), time.monotonic()
    child = worker._child
    kind, says = "accepted", ""
    try:
        drive(worker)
    except (SemiSAMError, Refused) as error:
        kind, says = "refused", str(error)
        if len(says) < 10:
            kind = "fault"
    except MemoryError:
        kind, says = "fault", f"over memory\n{traceback.format_exc()}"
    except Exception:  # noqa: BLE001 - what is looked for
        kind, says = "fault", traceback.format_exc()
    seconds, after = time.monotonic() - start, _snapshot(root, box.out)
    changed = [f"changed: {name}" for name in {*before, *after} if before.get(name) != after.get(name)]
    if wrong := changed + _leaks(box.out):
        kind, says = "fault", "; ".join(wrong)
    if kind != "fault":
        shutil.rmtree(root)
    grown = max(_grown_mb(os.getpid()), _grown_mb(worker._child.pid if worker._child else None))
    return {"kind": kind, "says": says, "seconds": seconds, "grown_mb": grown, "ended": worker._child is not child}


class Process:
    """The process that tries inputs, started anew after one that it did not survive."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._context = folder, multiprocessing.get_context("spawn")
        self._line: Connection | None = None
        self._child: Any = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        if self._line is not None:
            self._line.close()
            self._child.join(5)
            self._child.kill()
            self._child.join()
            self._line = None

    def tried(self, surface: str, seed: int, number: int) -> dict[str, Any]:
        """Return how an input was taken."""
        if self._line is None:
            self._line, theirs = self._context.Pipe()
            self._child = self._context.Process(target=_serve, args=(theirs, str(self._folder)))
            self._child.start()
            theirs.close()
            if not self._line.poll(START_SECONDS):
                raise RuntimeError("the process that tries inputs did not start")
            self._line.recv()
        start = time.monotonic()
        self._line.send((surface, seed, number))
        try:
            if self._line.poll(SECONDS + LIMITS.seconds):
                found: dict[str, Any] = self._line.recv()
                if found["seconds"] > SECONDS:
                    found |= {"kind": "fault", "says": f"over time: {found['seconds']:.0f} s; {found['says']}"}
                return found
            says = "over time: it did not return"
        except (EOFError, OSError):
            says = "the process that lists and records ended"
        self._child.kill()
        self.close()
        return {"kind": "fault", "says": says, "seconds": time.monotonic() - start, "grown_mb": 0.0, "ended": True}


@dataclass
class Tally:
    """What became of a surface's inputs."""

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest_s: float = 0.0
    grown_mb: float = 0.0
    ended: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, found: dict[str, Any]) -> None:
        """Count one input."""
        self.kinds[found["kind"]] += 1
        self.seconds += found["seconds"]
        self.slowest_s = max(self.slowest_s, found["seconds"])
        self.grown_mb = max(self.grown_mb, found["grown_mb"])
        self.ended += found["ended"]
        if found["kind"] == "refused":
            self.reasons[re.sub(r"[0-9]+|'[^']*'|/\S+|\"[^\"]*\"", "~", found["says"])[:100]] += 1
        if found["kind"] == "fault":
            self.faults.append({"input": number, "says": found["says"]})


def fuzz(
    surfaces: Sequence[str], inputs: int | None, minutes: float | None, seed: int, first: int, folder: Path
) -> dict[str, Tally]:
    """Try inputs of each surface in turn until there were so many, or so much time has passed."""
    tallies: dict[str, Tally] = {name: Tally() for name in surfaces}
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    numbers = itertools.count(first) if inputs is None else range(first, first + inputs)
    with Process(folder) as process, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("inputs", total=None if inputs is None else inputs * len(surfaces))
        for number in numbers:
            for name in surfaces:
                if time.monotonic() > until:
                    return tallies
                tallies[name].add(number, process.tried(name, seed, number))
                bar.advance(task)
    return tallies


def as_table(tallies: dict[str, Tally]) -> Table:
    """Return a row for each surface."""
    table = Table(box=None, header_style="bold")
    for column in (
        "surface",
        "inputs",
        "accepted",
        "refused",
        "faults",
        "reader ended",
        "mean s",
        "slowest s",
        "peak MB",
    ):
        table.add_column(column, justify="left" if column == "surface" else "right")
    for name, each in tallies.items():
        total = each.kinds.total()
        counts = (total, each.kinds["accepted"], each.kinds["refused"], each.kinds["fault"], each.ended)
        mean = each.seconds / max(1, total)
        table.add_row(name, *map(str, counts), f"{mean:.2f}", f"{each.slowest_s:.1f}", f"{each.grown_mb:.0f}")
    return table


def main() -> int:
    """Fuzz, print the table and the faults, and return 1 if there were any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SURFACES, default=list(SURFACES), help="surfaces; by default all")
    parser.add_argument("--inputs", type=int, help="inputs of each surface; by default 200, or what --minutes allow")
    parser.add_argument("--minutes", type=float, help="time for all surfaces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first input")
    parser.add_argument("--json", type=Path, help="file for the counts and faults")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that were faults")
    wanted = parser.parse_args()
    inputs = wanted.inputs if wanted.inputs or wanted.minutes else 200
    with tempfile.TemporaryDirectory() as temporary:
        folder = wanted.keep or Path(temporary)
        tallies = fuzz(wanted.only, inputs, wanted.minutes, wanted.seed, wanted.first, folder)
    console = Console()
    console.print(as_table(tallies))
    for name, each in tallies.items():
        for fault in each.faults:
            console.print(f"\n{name}, input {fault['input']}: {fault['says']}", markup=False, highlight=False)
    if wanted.json:
        content = {name: vars(each) | {"reasons": dict(each.reasons.most_common(25))} for name, each in tallies.items()}
        wanted.json.write_text(json.dumps({"seed": wanted.seed, "surfaces": content}, indent=2) + "\n")
    return 1 if any(each.faults for each in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
