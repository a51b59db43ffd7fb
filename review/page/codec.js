"use strict";
// Masks as run lengths, as review/codec.py has them: class in the highest 8 bits, voxels in the other 24, little-endian.
const LONGEST_RUN = 0xffffff;

function encode(mask) {
  const runs = [];
  for (let start = 0; start < mask.length; ) {
    let end = start + 1;
    while (end < mask.length && end - start < LONGEST_RUN && mask[end] === mask[start]) end += 1;
    runs.push([mask[start], end - start]);
    start = end;
  }
  const bytes = new Uint8Array(4 * runs.length);
  const view = new DataView(bytes.buffer);
  runs.forEach(([value, length], k) => view.setUint32(4 * k, value * 0x1000000 + length, true));
  return bytes;
}

function decode(bytes, voxels) {
  if (bytes.length % 4) throw new Error("the mask's runs are cut");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const mask = new Uint8Array(voxels);
  let at = 0;
  for (let k = 0; k < bytes.length; k += 4) {
    const run = view.getUint32(k, true);
    const length = run & LONGEST_RUN;
    if (!length || at + length > voxels) throw new Error("the mask's runs do not fit the scan");
    mask.fill(run >>> 24, at, at + length);
    at += length;
  }
  if (at !== voxels) throw new Error("the mask's runs do not fit the scan");
  return mask;
}

if (typeof module !== "undefined") module.exports = { encode, decode };
