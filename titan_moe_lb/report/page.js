// Inflates what is embedded, draws the charts and moves the heatmaps with the slider.
const inflate = (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
};

// Codes are stored plain or as differences from step to step, modulo 256; see load_codes.py.
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

const start = async () => {
  // A plain script, so that plotly finds the window.
  const script = document.createElement("script");
  script.textContent = await (await inflate("plotly")).text();
  document.head.append(script);
  const data = JSON.parse(await (await inflate("data")).text());
  const { lowestOctave, levelsPerOctave, dead, colorRange } = data;
  const octaves = (code) => (code - 1) / levelsPerOctave + lowestOctave;
  const load = (code) => (code === 0 ? 0 : 2 ** octaves(code));
  const color = Array.from({ length: 256 }, (_, code) =>
    code === 0 ? dead : Math.max(-colorRange, Math.min(colorRange, octaves(code))));
  const label = Array.from({ length: 256 }, (_, code) => load(code).toPrecision(2));
  const config = { responsive: true, displayModeBar: false };
  const loads = await Promise.all(data.runs.map((run, index) => loadsOf(index, run)));
  const slider = document.getElementById("slider");

  const heatmapAt = (run, index, frame) => {
    const size = run.layers.length * run.numExperts;
    const codes = Array.from(loads[index].subarray(frame * size, (frame + 1) * size));
    return { z: rows(codes.map((code) => color[code]), run), customdata: rows(codes.map((code) => label[code]), run) };
  };
  const show = () => {
    const step = data.runs[0].frames[slider.value];
    const shown = data.runs.map((run, index) => {
      const frame = nearest(run.frames, step);
      const { z, customdata } = heatmapAt(run, index, frame);
      Plotly.restyle(`heatmap-${index}`, { z: [z], customdata: [customdata] });
      return (data.runs.length > 1 ? `${data.course.data[index].name}: ` : "") + `step ${run.frames[frame]}`;
    });
    document.getElementById("step").textContent = shown.join(", ");
    slider.setAttribute("aria-valuetext", shown.join(", "));
  };
  const move = (by) => { slider.value = Number(slider.value) + by; show(); };

  const follow = (layer, expert) => {
    const curves = data.runs.map((run, index) => ({
      ...data.course.data[index],
      x: run.frames,
      y: run.frames.map((_, frame) => load(loads[index][(frame * run.layers.length + layer) * run.numExperts + expert])),
    }));
    document.getElementById("picked").textContent = `Layer ${data.runs[0].layers[layer]}, expert ${expert}, over the steps`;
    Plotly.react("course", curves, data.course.layout, config);
  };

  data.runs.forEach((run, index) => {
    Plotly.newPlot(`heatmap-${index}`, run.heatmap.data, run.heatmap.layout, config);
    document.getElementById(`heatmap-${index}`).on("plotly_click", ({ points: [point] }) => follow(...point.pointIndex));
  });
  show();
  slider.addEventListener("input", show);
  document.getElementById("previous").addEventListener("click", () => move(-1));
  document.getElementById("next").addEventListener("click", () => move(1));
  const drawings = JSON.parse(await (await inflate("drawings")).text());
  drawings.forEach((figures, chart) =>
    figures.forEach((figure, index) => Plotly.newPlot(`chart-${chart}-${index}`, figure.data, figure.layout, config)));
};

start().catch((error) => {
  const warning = document.createElement("p");
  warning.className = "warning";
  warning.textContent = `The charts cannot be drawn (${error}): open this page in a browser of 2023 or later.`;
  document.querySelector("main").prepend(warning);
});
