"use strict";
// Runs the page's own scripts against a running server, with as much of a browser as they need: no layout, no pixels.
const fs = require("fs");
const vm = require("vm");
const [folder, url] = process.argv.slice(2);

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, style: {}, textContent: "", className: "", value: "", max: "" });
    Object.assign(this, { clientWidth: 500, clientHeight: 500, disabled: false, id: "" });
  }
  append(...more) { this.children.push(...more); more.forEach((each) => each.id && (elements[each.id] = each)); }
  replaceChildren(...all) { this.children = []; this.append(...all); all.forEach((each) => each.children.forEach((one) => one.id && (elements[one.id] = one))); }
  addEventListener(kind, listener) { (this.listeners[kind] ||= []).push(listener); }
  fire(kind, event = {}) { (this.listeners[kind] || []).forEach((each) => each({ preventDefault() {}, target: this, ...event })); }
  setPointerCapture() {}
  matches() { return false; }
  getBoundingClientRect() { return { left: 0, top: 0, width: this.width, height: this.height }; }
  getContext() {
    return { createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }), putImageData: (each) => { drawn = each.data; } };
  }
}

const elements = {};
let drawn = null;
for (const [, id] of fs.readFileSync(`${folder}/index.html`, "utf8").matchAll(/id="([^"]+)"/g)) elements[id] = new Element(id);
Object.assign(elements.opacity, { value: "45" });
Object.assign(elements.zoom, { value: "100" });
Object.assign(elements.brush, { value: "8" });
Object.assign(elements.minutes, { value: "0" });
const body = new Element("body");
const document = new Element("document");
Object.assign(document, {
  hidden: false, body, createElement: (tag) => new Element(tag),
  getElementById: (id) => { if (!elements[id]) throw new Error(`the page has no element ${id}`); return elements[id]; },
});
const origin = new URL(url).origin;
const posted = [];
const context = {
  document, console, Date, Error, TypeError, Uint8Array, Uint16Array, Uint32Array, DataView, Map, Math, Number, Object, JSON, String,
  Option: class extends Element { constructor(text, value) { super("option"); Object.assign(this, { textContent: text, value }); } },
  btoa: (text) => Buffer.from(text, "latin1").toString("base64"),
  fetch: (path, options = {}) => {
    if (options.method === "POST") posted.push([path, JSON.parse(options.body)]);
    return fetch(new URL(path, url), { ...options, headers: { ...options.headers, Origin: origin } });
  },
  window: { confirm: () => true, setInterval: () => 0, addEventListener() {} },
};
vm.createContext(context);
for (const name of ["codec.js", "painting.js", "page.js"]) vm.runInContext(fs.readFileSync(`${folder}/${name}`, "utf8"), context);

const settled = async (done, what) => {
  for (let k = 0; k < 300 && !done(); k += 1) await new Promise((resolve) => setTimeout(resolve, 50));
  if (!done()) throw new Error(`${what}: ${elements.message.textContent}`);
};

(async () => {
  await settled(() => drawn !== null && elements.where.textContent && elements.ratings.children.length, "the first scan is not shown");
  const cases = elements.worklist.children.map((each) => each.children[0].textContent);
  const colour = () => drawn.reduce((sum, each, k) => sum + (k % 4 === 0 && each !== drawn[k + 1] ? 1 : 0), 0);
  const before = colour();
  const press = { button: 0, clientX: 2, clientY: 2, pointerId: 1, shiftKey: false };
  const stroke = async () => {
    drawn = null;
    elements.picture.fire("pointerdown", press);
    elements.picture.fire("pointermove", { ...press, clientX: 8 });
    elements.picture.fire("pointerup", press);
    await settled(() => drawn !== null, "nothing is drawn");
  };
  await stroke();
  const painted = colour();
  drawn = null;
  document.fire("keydown", { key: "z", target: elements.picture });
  await settled(() => drawn !== null, "undo draws nothing");
  const undone = colour();
  await stroke();
  drawn = null;
  elements.place.fire("wheel", { deltaY: 1 });
  await settled(() => drawn !== null, "the wheel shows nothing");
  const where = elements.where.textContent;
  elements["hand-over"].fire("click");
  await settled(() => elements.exchange.textContent, "nothing is handed over");
  elements.keep.fire("click");
  await settled(() => elements.message.textContent === "Rate every class first.", "an unrated scan is kept");
  elements["rating-0"].value = "2";
  elements.minutes.value = "3.5";
  await new Promise((resolve) => setTimeout(resolve, 100));
  elements.keep.fire("click");
  await settled(() => posted.some(([path]) => path === "scans/0/review"), "nothing is posted");
  await settled(() => /done/.test(elements.worklist.children[0].className), "the scan is not marked as done");
  await settled(() => /open/.test(elements.worklist.children[1].className), "the next scan is not opened");
  await new Promise((resolve) => setTimeout(resolve, 300));
  elements.end.fire("click");
  await settled(() => /has ended/.test(body.textContent), "the work does not end");
  const [, review] = posted.find(([path]) => path === "scans/0/review");
  console.log(JSON.stringify({ cases, before, painted, undone, where, exchange: elements.exchange.textContent, review }));
  process.exit(0);
})().catch((error) => { console.error(error.stack); process.exit(1); });
