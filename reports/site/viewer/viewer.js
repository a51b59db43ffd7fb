"use strict";
// Shows the volumes that the page itself holds. It asks nobody for anything.

const $ = (name) => document.getElementById(name);
const cases = JSON.parse($("cases").textContent);
const colours = JSON.parse($("colours").textContent);

// Background is clear, class k has the k-th colour.
function labelColours() {
  const rows = [[0, 0, 0, 0], ...colours.map((each) => [...each, 255])];
  const [R, G, B, A] = [0, 1, 2, 3].map((channel) => rows.map((row) => row[channel]));
  return { R, G, B, A, I: rows.map((_, k) => k), labels: rows.map(() => "") };
}

async function volumeOf(layer) {
  const image = await niivue.NVImage.loadFromBase64({ base64: layer.nifti, name: `${layer.name}.nii.gz` });
  if (layer.kind === "structures") image.setColormapLabel(labelColours());
  else Object.assign(image, { cal_min: 0, cal_max: 255, colormap: layer.kind === "uncertainty" ? "warm" : "gray" });
  return image;
}

async function show(viewer, number) {
  $("state").textContent = "Opening ...";
  while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[0]);
  const { layers } = cases[number];
  for (const layer of layers) viewer.addVolume(await volumeOf(layer));
  $("layers").replaceChildren(...layers.map((layer, k) => {
    const label = document.createElement("label");
    const range = document.createElement("input");
    Object.assign(range, { type: "range", min: "0", max: "100", id: `opacity-${k}` });
    range.value = k === 0 ? "100" : layer.shown ? "50" : "0";
    const apply = () => viewer.setOpacity(k, Number(range.value) / 100);
    range.addEventListener("input", apply);
    apply();
    label.append(`${layer.name} `, range);
    return label;
  }));
  viewer.updateGLVolume();
  $("state").textContent = `${cases[number].name}: ${layers.map((layer) => layer.name).join(", ")}`;
}

async function start() {
  const viewer = new niivue.Niivue({
    backColor: [0, 0, 0, 1],
    crosshairWidth: 0.15,
    dragAndDropEnabled: false,
    logLevel: "error",
    isNearestInterpolation: true, // or a class would show between two others
    isRadiologicalConvention: true, // as in the report
    multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
    show3Dcrosshair: true,
  });
  await viewer.attachToCanvas($("volume"));
  const views = [
    ["planes and volume", viewer.sliceTypeMultiplanar],
    ["axial", viewer.sliceTypeAxial],
    ["coronal", viewer.sliceTypeCoronal],
    ["sagittal", viewer.sliceTypeSagittal],
    ["volume", viewer.sliceTypeRender],
  ];
  views.forEach(([name, kind]) => $("view").append(new Option(name, String(kind))));
  cases.forEach(({ name }, number) => $("case").append(new Option(name, String(number))));
  $("view").addEventListener("change", () => viewer.setSliceType(Number($("view").value)));
  const open = () => show(viewer, Number($("case").value)).catch((error) => { $("state").textContent = String(error); });
  $("case").addEventListener("change", open);
  viewer.setSliceType(views[0][1]);
  await open();
}

start().catch((error) => { $("state").textContent = `This browser cannot show it: ${error.message}`; });
