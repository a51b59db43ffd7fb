"use strict";
// Drawing on a mask. It is stored head by back by left, the axis to the patient's left fastest, as the command sends it.
// `shape` and `spacing` are of the axes to the left, the back and the head.

const MOST_STROKES = 100;

// Rows and columns of a slice: axial slices have the front on top, the others the head.
function sliceSize(shape, axis) {
  const [left, back, head] = shape;
  return [[head, back], [head, left], [back, left]][axis];
}

function sliceSpacing(spacing, axis) {
  return sliceSize(spacing, axis);
}

// Where the voxel at this row and column of a slice is in the mask.
function voxelAt(shape, axis, slice, row, column) {
  const [left, back, head] = shape;
  const [x, y, z] = [
    [slice, column, head - 1 - row],
    [column, slice, head - 1 - row],
    [column, row, slice],
  ][axis];
  return (z * back + y) * left + x;
}

// Draw a disc of this radius in mm; tell `changed(voxel, before)` of every voxel that changes.
function drawDisc(mask, shape, spacing, axis, slice, row, column, radius, value, changed) {
  const [rows, columns] = sliceSize(shape, axis);
  const [high, wide] = sliceSpacing(spacing, axis);
  const [reachRows, reachColumns] = [Math.ceil(radius / high), Math.ceil(radius / wide)];
  for (let r = Math.max(0, row - reachRows); r <= Math.min(rows - 1, row + reachRows); r += 1)
    for (let c = Math.max(0, column - reachColumns); c <= Math.min(columns - 1, column + reachColumns); c += 1) {
      const apart = Math.hypot((r - row) * high, (c - column) * wide);
      if (apart > radius && !(r === row && c === column)) continue;
      const voxel = voxelAt(shape, axis, slice, r, c);
      if (mask[voxel] === value) continue;
      changed(voxel, mask[voxel]);
      mask[voxel] = value;
    }
}

// Discs from one place to another, so that a fast stroke has no gaps.
function drawLine(mask, shape, spacing, axis, slice, from, to, radius, value, changed) {
  const steps = Math.max(1, Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
  for (let k = 0; k <= steps; k += 1) {
    const row = Math.round(from[0] + ((to[0] - from[0]) * k) / steps);
    const column = Math.round(from[1] + ((to[1] - from[1]) * k) / steps);
    drawDisc(mask, shape, spacing, axis, slice, row, column, radius, value, changed);
  }
}

class Strokes {
  constructor() {
    this.strokes = [];
  }

  begin() {
    this.strokes.push([]);
    if (this.strokes.length > MOST_STROKES) this.strokes.shift();
  }

  record(voxel, before) {
    this.strokes[this.strokes.length - 1].push([voxel, before]);
  }

  // Undo the last stroke that changed anything; return whether there was one.
  undo(mask) {
    while (this.strokes.length) {
      const stroke = this.strokes.pop();
      for (let k = stroke.length - 1; k >= 0; k -= 1) mask[stroke[k][0]] = stroke[k][1];
      if (stroke.length) return true;
    }
    return false;
  }
}

// Fill RGBA pixels of a slice: the image between lower and upper, the mask's colours over it.
function paintSlice(pixels, image, mask, shape, axis, slice, lower, upper, opacity, colours) {
  const [rows, columns] = sliceSize(shape, axis);
  for (let row = 0; row < rows; row += 1)
    for (let column = 0; column < columns; column += 1) {
      const at = row * columns + column;
      const grey = Math.max(0, Math.min(255, (255 * (image[at] - lower)) / (upper - lower)));
      const value = mask[voxelAt(shape, axis, slice, row, column)];
      const share = value ? opacity : 0;
      const colour = value ? colours[(value - 1) % colours.length] : [0, 0, 0];
      for (let k = 0; k < 3; k += 1) pixels[4 * at + k] = (1 - share) * grey + share * colour[k];
      pixels[4 * at + 3] = 255;
    }
}

if (typeof module !== "undefined")
  module.exports = { sliceSize, sliceSpacing, voxelAt, drawDisc, drawLine, Strokes, paintSlice, MOST_STROKES };
