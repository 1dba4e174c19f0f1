// What every page does: inflate what is embedded, and draw it in the theme of its reader.
const inflate = (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
};
const textOf = async (id) => (await inflate(id)).text();
// The height is the element's own too: what stands below waits for no drawing.
const draw = (id, data, layout) => {
  document.getElementById(id).style.height = `${layout.height}px`;
  return Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
};

// A figure names its colours as a style sheet does; here they become those of the theme.
const themed = (text) => {
  const style = getComputedStyle(document.documentElement);
  return JSON.parse(text, (_, value) =>
    /^var\(--[\w-]+\)$/.test(value) ? style.getPropertyValue(value.slice(4, -1)).trim() : value);
};
const inEveryTheme = (show) => {
  show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
};

const drawPage = async (first = () => {}) => {
  // A plain script, so that plotly finds the window.
  const script = document.createElement("script");
  script.textContent = await textOf("plotly");
  document.head.append(script);
  await first();
  const drawings = await textOf("drawings");
  inEveryTheme(() => themed(drawings).forEach((figures, chart) =>
    figures.forEach((figure, index) => draw(`chart-${chart}-${index}`, figure.data, figure.layout))));
};

const explain = (error) => {
  const warning = document.createElement("p");
  warning.className = "warning";
  warning.textContent = `The charts cannot be drawn (${error}): open this page in a browser of 2023 or later.`;
  document.querySelector("main").prepend(warning);
};
