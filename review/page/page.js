"use strict";
// The page: asks the command for scans, shows slices, lets the rater draw, and sends reviews. It asks nobody else.

const COLOURS = [[255, 90, 80], [80, 190, 255], [120, 230, 110], [255, 205, 70], [205, 130, 255], [255, 150, 200]];
const KEPT_SLICES = 200;
const IDLE_MS = 60000; // after which the clock stops
const $ = (name) => document.getElementById(name);

let list = null; // what the worklist says
let desk = null; // the open scan: number, about, mask, shown (the pseudo-label), history, slices, changed
let value = 1; // what the brush draws; 0 erases
let drawing = null; // [row, column] of the last disc while a button is down
let busy = false;
let seconds = 0;
let lastAction = 0;

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

async function post(path, content) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(content) })).json();
}

function say(text, bad) {
  $("message").textContent = text;
  $("message").className = bad ? "bad" : "";
}

// Run one action at a time, and say what went wrong.
async function act(action) {
  if (busy) return;
  busy = true;
  try {
    await action();
  } catch (error) {
    say(error instanceof TypeError ? "The command has ended or cannot be reached." : error.message, true);
  } finally {
    busy = false;
  }
}

async function showWorklist() {
  list = await (await ask("worklist")).json();
  $("about").textContent = `run ${list.run}, rater ${list.rater}${list.second ? ", second look" : ""}`;
  $("worklist").replaceChildren(
    ...list.scans.map((scan, number) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.textContent = scan.case;
      const doubts = scan.classes.map((each) =>
        each.refused
          ? `${each.name}: refused (${each.refused})`
          : `${each.name}: disagreement ${each.disagreement}, ${each.volume_ml} ml` +
            (each.implausibility === null ? "" : `, volume doubt ${each.implausibility}`));
      const small = document.createElement("small");
      small.textContent = [scan.done || (scan.doubt === null ? "" : `doubt ${scan.doubt}`), ...doubts].join("; ");
      button.append(small);
      button.addEventListener("click", () => act(() => openScan(number)));
      item.append(button);
      item.className = `${scan.done ? "done" : ""} ${desk && desk.number === number ? "open" : ""}`;
      return item;
    }));
  if (!list.scans.length) say("There is nothing to review.");
}

async function openScan(number) {
  if (desk && desk.changed && !window.confirm("Leave this scan without keeping its corrections?")) return;
  say("Opening ...");
  const about = await (await ask(`scans/${number}`)).json();
  const voxels = about.shape[0] * about.shape[1] * about.shape[2];
  const shown = decode(new Uint8Array(await (await ask(`scans/${number}/mask`)).arrayBuffer()), voxels);
  desk = { number, about, shown, mask: shown.slice(), history: new Strokes(), slices: new Map(), changed: false };
  desk.axis = about.axis;
  desk.slice = middle();
  seconds = 0;
  $("minutes").value = "0";
  $("exchange").textContent = "";
  $("take").disabled = true;
  $("plane").value = String(about.axis);
  buttons($("windows"), about.windows.map(([name]) => name), (k) => setWindow(about.windows[k][1], about.windows[k][2]));
  setWindow(about.windows[0][1], about.windows[0][2]);
  setUpSlices();
  const refused = Object.entries(about.refused).map(([name, gate]) => `${name}: no pseudo-label (${gate})`);
  say(refused.length ? `${refused.join("; ")}. Draw it if it is there.` : "");
  await showWorklist();
  await draw();
}

// The slice with most of the pseudo-label, else the middle one.
function middle() {
  const { shape } = desk.about;
  const [left, back] = shape;
  const counts = new Uint32Array(shape[desk.axis]);
  desk.mask.forEach((each, voxel) => {
    if (!each) return;
    const x = voxel % left, y = Math.floor(voxel / left) % back, z = Math.floor(voxel / left / back);
    counts[[x, y, z][desk.axis]] += 1;
  });
  const most = counts.indexOf(Math.max(...counts));
  return counts[most] ? most : Math.floor(shape[desk.axis] / 2);
}

function setUpSlices() {
  $("slice").max = String(desk.about.shape[desk.axis] - 1);
  $("slice").value = String(desk.slice);
}

function buttons(place, names, chosen, selected = 0) {
  place.replaceChildren(...names.map((name, k) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.className = k === selected ? "on" : "";
    button.addEventListener("click", () => {
      [...place.children].forEach((each, other) => { each.className = other === k ? "on" : ""; });
      chosen(k);
    });
    return button;
  }));
}

function setWindow(lower, upper) {
  const { about } = desk;
  const range = about.upper - about.lower || 1;
  $("level").value = String((1000 * ((lower + upper) / 2 - about.lower)) / range);
  $("width").value = String((1000 * (upper - lower)) / range);
  desk.window = [lower, upper];
  draw();
}

function windowFromSliders() {
  if (!desk) return;
  const { about } = desk;
  const range = about.upper - about.lower || 1;
  const level = about.lower + (Number($("level").value) / 1000) * range;
  const width = (Number($("width").value) / 1000) * range;
  desk.window = [level - width / 2, level + width / 2];
  draw();
}

async function imageSlice(axis, slice) {
  const { slices, number } = desk;
  const key = `${axis}/${slice}`;
  if (!slices.has(key)) {
    const bytes = await (await ask(`scans/${number}/slices/${key}`)).arrayBuffer();
    const view = new DataView(bytes);
    const image = new Uint16Array(bytes.byteLength / 2);
    for (let k = 0; k < image.length; k += 1) image[k] = view.getUint16(2 * k, true);
    if (slices.size >= KEPT_SLICES) slices.delete(slices.keys().next().value);
    slices.set(key, image);
  }
  return slices.get(key);
}

async function draw() {
  if (!desk) return;
  const now = desk;
  const { about, axis, slice, mask } = now;
  let image;
  try {
    image = await imageSlice(axis, slice);
  } catch (error) {
    say(error.message, true);
    return;
  }
  if (desk !== now || now.axis !== axis || now.slice !== slice) return; // the rater has moved on
  const [rows, columns] = sliceSize(about.shape, axis);
  const [high, wide] = sliceSpacing(about.spacing_mm, axis);
  const canvas = $("picture");
  canvas.width = columns;
  canvas.height = rows;
  const fit = Math.min($("place").clientWidth / (columns * wide), $("place").clientHeight / (rows * high));
  const zoom = (fit * Number($("zoom").value)) / 100;
  canvas.style.width = `${columns * wide * zoom}px`;
  canvas.style.height = `${rows * high * zoom}px`;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const range = about.upper - about.lower || 1;
  const [lower, upper] = now.window.map((each) => (65535 * (each - about.lower)) / range);
  const opacity = Number($("opacity").value) / 100;
  paintSlice(pixels.data, image, mask, about.shape, axis, slice, lower, Math.max(upper, lower + 1), opacity, COLOURS);
  context.putImageData(pixels, 0, 0);
  $("where").textContent = `${about.axes[axis]} ${slice + 1} of ${about.shape[axis]}` +
    (axis === 2 ? " · R left, front on top" : axis === 1 ? " · R left, head on top" : " · front left, head on top");
}

function moveTo(slice) {
  if (!desk) return;
  desk.slice = Math.max(0, Math.min(desk.about.shape[desk.axis] - 1, slice));
  $("slice").value = String(desk.slice);
  draw();
}

function place(event) {
  const box = $("picture").getBoundingClientRect();
  const [rows, columns] = sliceSize(desk.about.shape, desk.axis);
  return [
    Math.floor(((event.clientY - box.top) / box.height) * rows),
    Math.floor(((event.clientX - box.left) / box.width) * columns),
  ];
}

function stroke(event) {
  const to = place(event);
  const { about, axis, slice, mask, history } = desk;
  const radius = Number($("brush").value) / 2;
  const drawn = event.shiftKey ? 0 : value;
  drawLine(mask, about.shape, about.spacing_mm, axis, slice, drawing, to, radius, drawn, (voxel, before) => {
    history.record(voxel, before);
    desk.changed = true;
  });
  drawing = to;
  draw();
}

function undo() {
  if (desk && desk.history.undo(desk.mask)) draw();
}

function ratings() {
  return Object.fromEntries(list.classes.map((name, k) => [name, Number($(`rating-${k}`).value)]));
}

function base64(bytes) {
  let text = "";
  for (let k = 0; k < bytes.length; k += 0x8000) text += String.fromCharCode(...bytes.subarray(k, k + 0x8000));
  return btoa(text);
}

async function keep(more) {
  if (!desk) return;
  const rated = ratings();
  if (Object.values(rated).some((each) => !each)) throw new Error("Rate every class first.");
  const content = { ratings: rated, minutes: Number($("minutes").value), ...more };
  const answer = await post(`scans/${desk.number}/review`, content);
  desk.changed = false;
  say(`Kept: ${answer.decision}.`);
  const next = list.scans.findIndex((scan, number) => !scan.done && number > desk.number);
  list.classes.forEach((_, k) => { $(`rating-${k}`).value = "0"; });
  await showWorklist();
  if (next >= 0) await openScan(next);
}

async function handOver() {
  if (!desk) return;
  const answer = await post(`scans/${desk.number}/hand-over`, {});
  $("exchange").textContent = `${answer.folder}: open ${answer.files.join(", ")}; save the mask as mask.nii.gz there.`;
  $("take").disabled = false;
}

function setUp() {
  ["sagittal", "coronal", "axial"].forEach((name, k) => $("plane").append(new Option(name, String(k))));
  buttons($("classes"), [...list.classes, "erase"], (k) => { value = k < list.classes.length ? k + 1 : 0; });
  $("ratings").replaceChildren(...list.classes.map((name, k) => {
    const label = document.createElement("label");
    label.textContent = `${name} `;
    const choice = document.createElement("select");
    choice.id = `rating-${k}`;
    ["not rated", "1", "2", "3", "4"].forEach((each, rating) => choice.append(new Option(each, String(rating))));
    label.append(choice);
    return label;
  }));
  const picture = $("picture");
  picture.addEventListener("pointerdown", (event) => {
    if (!desk || event.button !== 0) return;
    picture.setPointerCapture(event.pointerId);
    desk.history.begin();
    drawing = place(event);
    stroke(event);
  });
  picture.addEventListener("pointermove", (event) => { if (desk && drawing) stroke(event); });
  ["pointerup", "pointercancel"].forEach((kind) => picture.addEventListener(kind, () => { drawing = null; }));
  $("place").addEventListener("wheel", (event) => {
    event.preventDefault();
    if (desk && !drawing) moveTo(desk.slice + Math.sign(event.deltaY));
  }, { passive: false });
  $("slice").addEventListener("input", () => moveTo(Number($("slice").value)));
  $("plane").addEventListener("change", () => {
    if (!desk) return;
    desk.axis = Number($("plane").value);
    desk.slice = middle();
    setUpSlices();
    draw();
  });
  ["level", "width"].forEach((name) => $(name).addEventListener("input", windowFromSliders));
  ["opacity", "zoom"].forEach((name) => $(name).addEventListener("input", draw));
  const radius = () => { $("radius").textContent = `${Number($("brush").value) / 2} mm`; };
  $("brush").addEventListener("input", radius);
  radius();
  $("undo").addEventListener("click", undo);
  $("revert").addEventListener("click", () => {
    if (!desk || !window.confirm("Drop all corrections of this scan?")) return;
    desk.mask.set(desk.shown);
    desk.history = new Strokes();
    desk.changed = false;
    draw();
  });
  $("keep").addEventListener("click", () => act(() => keep({ mask: base64(encode(desk.mask)) })));
  $("rate").addEventListener("click", () => act(() => keep({})));
  $("take").addEventListener("click", () => act(() => keep({ file: "nifti" })));
  $("hand-over").addEventListener("click", () => act(handOver));
  $("end").addEventListener("click", () => act(async () => {
    if (desk && desk.changed && !window.confirm("End without keeping the corrections of this scan?")) return;
    await post("end", {});
    document.body.textContent = "The work has ended; you can close this page.";
  }));
  document.addEventListener("keydown", (event) => {
    if (!desk || event.target.matches("input, select")) return;
    if (event.key === "z") undo();
    if (event.key === "ArrowUp" || event.key === "ArrowDown") moveTo(desk.slice + (event.key === "ArrowUp" ? 1 : -1));
  });
  ["pointermove", "keydown", "wheel"].forEach((kind) =>
    document.addEventListener(kind, () => { lastAction = Date.now(); }, { passive: true }));
  window.setInterval(() => {
    if (!desk || document.hidden || Date.now() - lastAction > IDLE_MS) return;
    seconds += 1;
    if (seconds % 6 === 0) $("minutes").value = (Number($("minutes").value) + 0.1).toFixed(1);
  }, 1000);
  window.addEventListener("beforeunload", (event) => { if (desk && desk.changed) event.preventDefault(); });
  window.addEventListener("resize", draw);
}

act(async () => {
  await showWorklist();
  setUp();
  if (list.scans.length) await openScan(0);
});
