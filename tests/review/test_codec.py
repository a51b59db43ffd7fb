"""Run lengths of masks: every mask comes back, nothing else is accepted, and the page's codec writes the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import review
from review import codec
from review.codec import CodecError, decode, encode

PAGE = Path(review.__file__).parent / "page"
MASKS = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(0, 5))


@given(mask=MASKS)
def test_every_mask_comes_back(mask: np.ndarray) -> None:
    content = encode(mask)
    assert np.array_equal(decode(content, mask.shape, 5), mask)
    changes = int((mask.reshape(-1)[1:] != mask.reshape(-1)[:-1]).sum())
    assert len(content) == codec.RUN_BYTES * (changes + 1)


@given(mask=MASKS, longest=st.integers(1, 9))
def test_runs_longer_than_the_number_holds_are_split(mask: np.ndarray, longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "LONGEST_RUN", longest)
        content = encode(mask)
    runs = np.frombuffer(content, "<u4")
    assert int((runs & codec.LONGEST_RUN).max()) <= longest
    assert np.array_equal(decode(content, mask.shape, 5), mask)


@settings(max_examples=300)
@given(content=st.binary(max_size=64))
def test_other_bytes_are_refused_or_are_a_mask(content: bytes) -> None:
    try:
        mask = decode(content, (2, 2, 2), 3)
    except CodecError:
        return
    assert mask.shape == (2, 2, 2)
    assert mask.max() <= 3


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([(1, 8), (0, 0)], "has no voxel"),
        ([(1, 7)], "have 7 voxels; the scan has 8"),
        ([(1, 9)], "have 9 voxels"),
        ([(4, 8)], "has the class 4; the plan has 3"),
        ([], "have 0 voxels"),
    ],
)
def test_runs_of_another_size_or_class_are_refused(runs: list[tuple[int, int]], says: str) -> None:
    content = np.array([value << 24 | length for value, length in runs], "<u4").tobytes()
    with pytest.raises(CodecError, match=says):
        decode(content, (2, 2, 2), 3)
    with pytest.raises(CodecError, match="4 bytes each"):
        decode(content + b"x", (2, 2, 2), 3)


def test_a_mask_of_many_voxels_is_small() -> None:
    mask = np.zeros((300, 300, 200), np.uint8)  # 18 million, more than one run holds
    assert len(encode(mask)) == 2 * codec.RUN_BYTES
    assert np.array_equal(decode(encode(mask), mask.shape, 1), mask)


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's codec, is not installed")
def test_the_pages_codec_writes_the_same_bytes_and_reads_them() -> None:
    random = np.random.default_rng(0)
    masks = [random.integers(0, 3, 500).astype(np.uint8), np.zeros(7, np.uint8), np.repeat(np.uint8([1, 0, 2]), 40)]
    script = f"""
      const codec = require({json.dumps(str(PAGE / "codec.js"))});
      const masks = {json.dumps([mask.tolist() for mask in masks])}.map((each) => Uint8Array.from(each));
      const coded = masks.map((mask) => codec.encode(mask));
      const equal = (first, second) => Buffer.compare(Buffer.from(first), Buffer.from(second)) === 0;
      const same = masks.every((mask, k) => equal(codec.decode(coded[k], mask.length), mask));
      let refused = 0;
      for (const bytes of [coded[0].slice(0, -4), coded[0].slice(0, -1), new Uint8Array(4)])
        try {{ codec.decode(bytes, 500); }} catch (error) {{ refused += 1; }}
      console.log(JSON.stringify({{ same, refused, coded: coded.map((each) => Buffer.from(each).toString("hex")) }}));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert (found["same"], found["refused"]) == (True, 3)
    assert found["coded"] == [encode(mask).hex() for mask in masks]
