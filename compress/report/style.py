"""Style sheet and script of the report page. Nothing is loaded from elsewhere.

The series colours are the Okabe-Ito palette, made darker for white paper and lighter
for dark, so that each has a contrast of at least 3:1 to its ground.
Source: Okabe and Ito (2008), "Color Universal Design".
"""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #57606a;
  --rule: #d4d8dd; --link: #0a58a8; --focus: #0a58a8;
  --note-ground: #fff4d6; --note-rule: #b07d00; --bad: #a3261b;
  --c0: #0072b2; --c1: #b97a00; --c2: #00806a; --c3: #c24a00;
  --c4: #a8508a; --c5: #2f8cc9; --c6: #4a4f55; --c7: #7d7300;
  --p0: #0072b2; --p1: #e0a030; --p2: #00806a; --p3: #8a8f96;
  --t0: #ffffff; --t1: #1b1f24; --t2: #ffffff; --t3: #1b1f24;
  --green: #00704f; --amber: #8a5a00; --red: #b3261e; --mark: #fde6d3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --panel: #1d2125; --ink: #e7eaed; --soft: #a3abb4;
    --rule: #3a4047; --link: #7fbcf5; --focus: #ffd166;
    --note-ground: #33290d; --note-rule: #d9a521; --bad: #ff8f85;
    --c0: #58aee8; --c1: #f0b440; --c2: #3cc7a0; --c3: #ff8b52;
    --c4: #e59ac6; --c5: #a9d8fb; --c6: #d3d7db; --c7: #e3d84f;
    --p0: #58aee8; --p1: #f0b440; --p2: #3cc7a0; --p3: #a3abb4;
    --t0: #14171a; --t1: #14171a; --t2: #14171a; --t3: #14171a;
    --green: #4fd0a5; --amber: #f0b440; --red: #ff8f85; --mark: #4a2c18;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; overflow-wrap: anywhere; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.wrap { max-width: 1200px; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.soft, .note, .caption { color: var(--soft); }
.note, .caption { font-size: .875rem; max-width: 80ch; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none;
  margin: .8rem 0 0; padding: 0; font-size: .95rem; }
.warnings { background: var(--note-ground); border-left: 5px solid var(--note-rule);
  padding: .7rem 1rem; margin: 1.2rem 0; border-radius: 0 6px 6px 0; }
.warnings h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; }
.warnings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.cards { display: grid; gap: .6rem; margin: 1.3rem 0 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.cards li { background: var(--panel); border: 1px solid var(--rule);
  border-radius: 8px; padding: .7rem .75rem; }
.cards .what { font-size: .85rem; color: var(--soft); }
.cards .value { font-size: 1.45rem; font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.cards .more { font-size: .85rem; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1.2rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: .9rem 1rem; background: var(--panel); min-width: 0;
  border: 1px solid var(--rule); border-radius: 8px; }
.figures > * { min-width: 0; }
.figures.layers > :first-child { grid-row: span 2; }
.figures > figure:only-child { max-width: 620px; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--soft); font-family: inherit; }
svg text.name { fill: var(--ink); font-weight: 600; }
svg text.small { font-size: 11.5px; }
svg text.inside { font-size: 12px; font-weight: 600; }
svg text.t0 { fill: var(--t0); } svg text.t1 { fill: var(--t1); }
svg text.t2 { fill: var(--t2); } svg text.t3 { fill: var(--t3); }
svg text.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 4px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.limit { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3; }
.rung { stroke: var(--soft); stroke-width: 2; }
.trace { fill: none; stroke: var(--c); stroke-width: 1.4; opacity: .75; }
.mark { fill: var(--c); stroke: var(--panel); stroke-width: .6; }
.mark.hollow { fill: var(--panel); stroke: var(--c); stroke-width: 1.4; }
.solid { fill: var(--c); background: var(--c); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
.p0 { fill: var(--p0); background: var(--p0); }
.p1 { fill: var(--p1); background: var(--p1); }
.p2 { fill: var(--p2); background: var(--p2); }
.p3 { fill: var(--p3); background: var(--p3); }
.h0 { fill: #eff3ff; background: #eff3ff; } .h1 { fill: #c6dbef; background: #c6dbef; }
.h2 { fill: #9ecae1; background: #9ecae1; } .h3 { fill: #6baed6; background: #6baed6; }
.h4 { fill: #2b74ab; background: #2b74ab; } .h5 { fill: #084a8f; background: #084a8f; }
svg text.on0, svg text.on1, svg text.on2, svg text.on3 { fill: #0b1a2b; }
svg text.on4, svg text.on5 { fill: #ffffff; }
.unused { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none;
  margin: .5rem 0 0; padding: 0; font-size: .875rem; }
.legend li { display: inline-flex; align-items: center; gap: .4rem; }
.legend svg { width: 30px; height: 14px; }
.legend.marks svg { width: 14px; }
.swatch { width: 14px; height: 14px; border-radius: 3px;
  outline: 1px solid var(--rule); }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll.tall { max-height: 34rem; overflow-y: auto; }
table { overflow-wrap: normal; border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); font-weight: 600; }
.tall thead th { position: sticky; top: 0; z-index: 1; }
tbody th { font-weight: 500; }
.r { text-align: right; }
td.wide { white-space: normal; min-width: 15rem; }
.sortable { font-size: .85rem; }
.sortable th, .sortable td { padding: .35rem .5rem; }
.sortable thead th { white-space: normal; vertical-align: bottom; }
.plain td, .plain tbody th { white-space: normal; overflow-wrap: anywhere; }
.plain tbody th { min-width: 7.5rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
th button::after { content: "\\a0\\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: "\\a0\\2191"; color: var(--ink); }
th[aria-sort="descending"] button::after { content: "\\a0\\2193"; color: var(--ink); }
.sample h3, .written { white-space: pre-wrap; }
.sample { margin-top: 1.2rem; }
.sample .pair { display: grid; gap: .6rem; grid-template-columns: 1fr 1fr; }
.sample .pair > div { background: var(--panel); border: 1px solid var(--rule);
  border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
.sample .what { font-size: .85rem; color: var(--soft); }
.sample .written { margin: .2rem 0 0; font-size: .95rem; }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid var(--c3); }
.light { font-weight: 650; white-space: nowrap; }
.light.green { color: var(--green); } .light.amber { color: var(--amber); }
.light.red { color: var(--red); } .failed { color: var(--bad); font-weight: 650; }
.lamps { list-style: none; padding: 0; margin: .6rem 0; display: flex;
  flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .9rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: .875em; }
code { overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; }
@media (min-width: 641px) { /* no card alone in a second row */
  .cards:has(> :nth-child(8)) { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .cards:has(> :nth-child(9)) { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
@media (max-width: 640px) {
  .wrap { padding: 1rem .9rem 2rem; }
  h1 { font-size: 1.35rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .cards li { padding: .6rem .7rem; }
  .cards .value { font-size: 1.15rem; }
  .sample .pair { grid-template-columns: 1fr; }
  figure { padding: .7rem; }
  svg text, svg text.inside { font-size: 17px; }
  svg text.small { font-size: 15.5px; }
  .legend li { min-height: 1.7rem; }
}
@media print { .scroll, .scroll.tall { max-height: none; overflow: visible; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = head.dataset.kind === "number"
          ? Number(x) - Number(y)
          : x.localeCompare(y, "en", { numeric: true });
        return up ? order : -order;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
"""
