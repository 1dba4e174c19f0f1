// Script of every page: inflate the embedded data, and draw the charts in the reader's theme.
const inflate = (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
};
const textOf = async (id) => (await inflate(id)).text();
// Set the height of the element too, so that the page below does not move when plotly draws.
const draw = (id, data, layout) => {
  document.getElementById(id).style.height = `${layout.height}px`;
  return Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
};

// Replace the CSS variables of a figure by the colours of the current theme.
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
  // plotly needs a classic script, not a module, to find the window.
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
