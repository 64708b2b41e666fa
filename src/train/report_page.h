// What the page of a report has beside its content: its look, and what shows values under the pointer.
#pragma once

#include <string_view>

namespace krait::report {

inline constexpr std::string_view kStyle = R"page(
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --text: #1b1d21; --muted: #666b75; --line: #dfe2e8;
  --c1: #2563eb; --c2: #d2580a; --c3: #0b8457; --c4: #7c3aed; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1e2126; --text: #e8eaee; --muted: #9aa1ad; --line: #343941;
    --c1: #6ea8fe; --c2: #f59e4c; --c3: #3fcf97; --c4: #b79bff; }
}
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 0 0 20px; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: 12px; background: var(--card); border-radius: 8px; position: relative; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 13px; color: var(--muted); }
figcaption b { color: var(--text); font-size: 15px; margin-right: 8px; }
.key { white-space: nowrap; margin-right: 10px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle;
  background: var(--colour); }
.key.faint::before { opacity: 0.4; }
.c1 { --colour: var(--c1); } .c2 { --colour: var(--c2); } .c3 { --colour: var(--c3); } .c4 { --colour: var(--c4); }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.curve polyline { fill: none; stroke: var(--colour); stroke-width: 1.6; stroke-linejoin: round; }
.curve.dense polyline { stroke-width: 1; }
.curve circle { fill: var(--colour); }
.curve.faint polyline { opacity: 0.4; }
.grid line { stroke: var(--line); }
.grid text { fill: var(--muted); font-size: 11px; }
@media (max-width: 900px) { .wide .grid text { font-size: 16px; } }
@media (max-width: 640px) { .wide .grid text { font-size: 24px; } }
.grid .y { text-anchor: end; }
.grid .x { text-anchor: middle; }
.cursor { stroke: var(--muted); stroke-dasharray: 3 3; }
.values { position: absolute; z-index: 1; pointer-events: none; padding: 5px 9px; border-radius: 6px; font-size: 12.5px;
  background: var(--page); border: 1px solid var(--line); white-space: nowrap; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-size: 14px; }
.settings { columns: 2 440px; column-gap: 32px; }
.settings table { width: 100%; }
tr { break-inside: avoid; }
th, td { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); }
th { font-weight: normal; color: var(--muted); white-space: nowrap; }
td { overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
summary { cursor: pointer; padding: 4px 0; }
pre { margin: 4px 0 14px; padding: 12px; background: var(--card); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13.5px/1.5 ui-monospace, monospace; }
)page";

inline constexpr std::string_view kScript = R"page(
for (const svg of document.querySelectorAll("svg.chart")) {
  const curves = [...svg.querySelectorAll(".curve")].map(g => ({
    name: g.dataset.name,
    steps: g.dataset.x.split(" "),
    values: g.dataset.y.split(" "),
    pixels: g.querySelector("polyline").getAttribute("points").split(" ").map(p => +p.split(",")[0]),
  }));
  const cursor = svg.querySelector(".cursor");
  const box = document.createElement("div");
  box.className = "values";
  box.hidden = true;
  svg.parentElement.append(box);

  const nearest = (pixels, x) => {
    let low = 0, high = pixels.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (pixels[middle] > x) high = middle; else low = middle;
    }
    return x - pixels[low] > pixels[high] - x ? high : low;
  };
  svg.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const found = curves.map(curve => ({ curve, i: nearest(curve.pixels, x) }));
    const distance = ({ curve, i }) => Math.abs(curve.pixels[i] - x);
    const closest = found.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const step = closest.curve.steps[closest.i];
    const at = closest.curve.pixels[closest.i];
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    const lines = ["step " + step];
    for (const { curve, i } of found) {
      const elsewhere = curve.steps[i] === step ? "" : " (step " + curve.steps[i] + ")";
      lines.push(curve.name + " " + curve.values[i] + elsewhere);
    }
    box.replaceChildren(...lines.flatMap(line => [line, document.createElement("br")]));
    box.hidden = false;
    const figure = svg.parentElement.getBoundingClientRect();
    const left = event.clientX - figure.left;
    const fits = left + box.offsetWidth + 24 < figure.width;
    box.style.left = (fits ? left + 14 : Math.max(0, left - box.offsetWidth - 10)) + "px";
    box.style.top = event.clientY - figure.top + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    box.hidden = true;
  });
}
)page";

}  // namespace krait::report
