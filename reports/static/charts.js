// Draws the page's figures in the page's colours, and again when they change; a click on a mark shows its cases, or its own page.
"use strict";

function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const layout = structuredClone(figure.layout);
  layout.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") };
  layout.hoverlabel = { bgcolor: colour("--page"), bordercolor: colour("--line"), font: { color: colour("--ink") } };
  for (const axis of Object.keys(layout).filter((name) => /^[xy]axis/.test(name)))
    Object.assign(layout[axis], { gridcolor: colour("--grid"), linecolor: colour("--line"), tickfont: { color: colour("--ink") } });
  for (const shape of layout.shapes || []) shape.line.color = colour("--quiet");
  return layout;
}

function draw(element) {
  const { figure, page } = JSON.parse(document.getElementById(element.dataset.figure).textContent);
  const options = { displaylogo: false, displayModeBar: false, responsive: true, scrollZoom: false };
  Plotly.react(element, structuredClone(figure.data), themed(figure), options);
  if (element.dataset.drawn) return;
  element.dataset.drawn = "yes";
  element.on("plotly_click", (event) => {
    const target = event.points[0].customdata;
    if (target) location.href = page === null ? target : `${page}#${target}`;
  });
}

const plots = document.querySelectorAll(".plot[data-figure]");
const drawAll = () => plots.forEach(draw);
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
