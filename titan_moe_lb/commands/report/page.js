// Script of the report: draw the maps at the slider's step, and the curve of the picked expert.
// Codes are stored plain, or as differences from step to step modulo 256; see load_codes.py.
const loadsOf = async (index, run) => {
  const form = new Uint8Array(await (await inflate(`loads-${index}`)).arrayBuffer());
  const codes = form.subarray(1);
  const size = run.layers.length * run.numExperts;
  if (form[0] === 1) for (let i = size; i < codes.length; i++) codes[i] += codes[i - size];
  return codes;
};

const rows = (values, run) =>
  Array.from({ length: run.layers.length }, (_, layer) => values.slice(layer * run.numExperts, (layer + 1) * run.numExperts));

const nearest = (frames, step) =>
  frames.reduce((best, frame, i) => (Math.abs(frame - step) < Math.abs(frames[best] - step) ? i : best), 0);

drawPage(async () => {
  const [slider, layer, expert] = ["slider", "layer", "expert"].map((id) => document.getElementById(id));
  const text = await textOf("data");
  const data = JSON.parse(text);
  const { runs, frames: allFrames, lowestOctave, levelsPerOctave, dead, colorRange } = data;
  const octaves = (code) => (code - 1) / levelsPerOctave + lowestOctave;
  const absent = 255;
  const load = (code) => (code === absent ? null : code === 0 ? 0 : 2 ** octaves(code));
  const color = Array.from({ length: 256 }, (_, code) =>
    code === absent ? null : code === 0 ? dead : Math.max(-colorRange, Math.min(colorRange, octaves(code))));
  const label = Array.from({ length: 256 }, (_, code) => (code === absent ? "–" : load(code).toPrecision(2)));
  const loads = await Promise.all(runs.map((run, index) => loadsOf(index, run)));
  let figures;

  const of = (index) => (runs.length > 1 ? `${data.course.data[index].name}: ` : "");
  const framesNow = () => runs.map((run) => nearest(run.frames, allFrames[slider.value]));
  // Row of the picked layer; -1 if the run lacks the layer or the expert.
  const rowOf = (run) => (Number(expert.value) < run.numExperts ? run.layers.indexOf(Number(layer.value)) : -1);
  const codeOf = (index, frame) => {
    const run = runs[index], row = rowOf(run);
    return row < 0 ? absent : loads[index][(frame * run.layers.length + row) * run.numExperts + Number(expert.value)];
  };
  // Frame around the picked expert. It has two colours, so it is visible on every load colour.
  const framed = (run, layout) => ({ ...layout, shapes: layout.shapes.map((shape) => ({
    ...shape, visible: rowOf(run) >= 0,
    x0: Number(expert.value) - 0.5, x1: Number(expert.value) + 0.5,
    y0: rowOf(run) - 0.5, y1: rowOf(run) + 0.5,
  })) });

  const showMap = (run, index, frame) => {
    const size = run.layers.length * run.numExperts;
    const codes = Array.from(loads[index].subarray(frame * size, (frame + 1) * size));
    const empty = codes.flatMap((code, at) => (code === 0 ? [at] : []));
    const { data: [map, crosses], layout } = figures.runs[index].heatmap;
    const { width } = document.getElementById(`heatmap-${index}`).getBoundingClientRect();
    // In smaller cells, crosses would hide the black.
    const cell = Math.min(width / run.numExperts, layout.height / run.layers.length);
    const crossed = cell < 8 ? [] : empty;
    const marker = { ...crosses.marker, size: Math.min(20, cell * 0.6) };
    draw(`heatmap-${index}`, [
      { ...map, z: rows(codes.map((code) => color[code]), run), text: rows(codes.map((code) => label[code]), run) },
      { ...crosses, marker, x: crossed.map((at) => at % run.numExperts), y: crossed.map((at) => String(run.layers[Math.floor(at / run.numExperts)])) },
    ], framed(run, layout));
  };
  const showCourse = (step) => draw("course", runs.map((run, index) => ({
    ...figures.course.data[index], x: run.frames, y: run.frames.map((_, frame) => load(codeOf(index, frame))),
  })), {
    ...figures.course.layout, shapes: figures.course.layout.shapes.map((line) => ({ ...line, x0: step, x1: step })),
  });

  const show = () => {
    const frames = framesNow();
    const shown = runs.map((run, index) => run.frames[frames[index]]);
    const steps = new Set(shown).size === 1 ? `step ${shown[0]}` : shown.map((step, index) => `${of(index)}step ${step}`).join(", ");
    const picked = runs.map((_, index) => `${of(index)}${label[codeOf(index, frames[index])]} × balanced`).join(", ");
    document.getElementById("step").textContent = steps;
    document.getElementById("picked").textContent = picked;
    slider.setAttribute("aria-valuetext", steps);
    runs.forEach((run, index) => showMap(run, index, frames[index]));
    showCourse(allFrames[slider.value]);
  };
  const move = (by) => { slider.value = Number(slider.value) + by; show(); };

  inEveryTheme(() => { figures = themed(text); show(); });
  runs.forEach((run, index) => document.getElementById(`heatmap-${index}`).on("plotly_click", ({ points: [point] }) => {
    [layer.value, expert.value] = [run.layers[point.pointIndex[0]], point.pointIndex[1]];
    show();
  }));
  document.querySelectorAll("[data-layer]").forEach((link) => link.addEventListener("click", () => {
    [layer.value, expert.value] = [link.dataset.layer, link.dataset.expert];
    show();
  }));
  slider.addEventListener("input", show);
  layer.addEventListener("input", show);
  expert.addEventListener("input", () => expert.checkValidity() && show());
  document.getElementById("previous").addEventListener("click", () => move(-1));
  document.getElementById("next").addEventListener("click", () => move(1));
}).catch(explain);
