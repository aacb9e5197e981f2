"""The stylesheet of the report; other pages use its colours and charts alone.

Deliberately not here: fonts or images from anywhere; the reader's own are used.
"""

from __future__ import annotations

PALETTE = """
:root { color-scheme: light dark;
  --paper:#faf9f6; --card:#fff; --ink:#1d2024; --soft:#5a616b; --line:#e4e1d9; --rail:#eeece6;
  --base:#98a1ae; --tuned:#1f6f8b; --good:#2b7a4b; --bad:#b3432f; --quiet:#757c87;
  --good-wash:#e6f2ea; --bad-wash:#fae9e5; --quiet-wash:#efeeea; --warn:#8a5a00; --warn-wash:#fdf3dd;
  --serif:"Iowan Old Style","Palatino Linotype",Palatino,Charter,"Bitstream Charter",Georgia,"DejaVu Serif",serif;
  --sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif;
  --mono:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#14161a; --card:#1b1e24; --ink:#e9e7e2; --soft:#a2a9b4; --line:#2d3139; --rail:#262a31;
  --base:#7d8795; --tuned:#62b6d3; --good:#6cc48d; --bad:#ee9079; --quiet:#9aa2ae;
  --good-wash:#1d3326; --bad-wash:#3b2420; --quiet-wash:#262a31; --warn:#e9bd62; --warn-wash:#33290f; } }
"""

CHARTS = """
.charts + details { margin-top:18px; }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr)); gap:18px; }
.charts.wide { grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr)); margin-bottom:16px; }
.inside > .charts.wide { margin:0; }
figure { margin:0; }
.panel { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px 12px;
  min-width:0; }
.panel { display:flex; flex-direction:column; } .panel > .chart { margin-top:auto; }
.panel > figcaption { margin-bottom:8px; } .panel > figcaption b { font-weight:600; display:block; }
.panel > figcaption span { color:var(--soft); font-size:.86rem; }
.panel table { font-size:.86rem; }
.panel th, .panel td { padding:6px 8px; }
.panel th:first-child { padding-left:0; } .panel table, .panel .tree { margin-bottom:8px; }
.panel tbody th { font-size:.86rem; }
.chart { overflow:visible; width:100%; height:auto; display:block; max-width:520px; }
.chart text { font:12px var(--sans); fill:var(--ink); font-variant-numeric:tabular-nums;
  paint-order:stroke; stroke:var(--card); stroke-width:4px; stroke-linejoin:round; }
.chart text.tick { fill:var(--soft); font-size:11px; } .chart text.value { font-size:11.5px; }
.chart .middle { text-anchor:middle; } .chart .end { text-anchor:end; }
svg line { stroke-width:1; } svg .grid { stroke:var(--line); } svg .zero { stroke:var(--soft); stroke-dasharray:2 3; }
svg .rail { stroke:var(--line); } svg .whisker { stroke-width:1.6; stroke-linecap:round; }
svg .t-base { stroke:var(--base); } svg .t-tuned { stroke:var(--tuned); } svg .t-good { stroke:var(--good); }
svg .t-bad { stroke:var(--bad); } svg .t-quiet { stroke:var(--quiet); } svg .t-ink { stroke:var(--ink); }
svg .t-base.fill { fill:var(--base); } svg .t-tuned.fill { fill:var(--tuned); } svg .t-good.fill { fill:var(--good); }
svg .t-bad.fill { fill:var(--bad); } svg .t-ink.fill { fill:var(--ink); } svg .t-quiet.fill { fill:var(--quiet); }
svg .fill { stroke:none; }
svg path { fill:none; stroke-linejoin:round; stroke-linecap:round; } svg .line { stroke-width:2; }
svg path.t-bad.line { stroke-dasharray:6 4; }
svg .raw { stroke-width:1; opacity:.3; } svg .thin { stroke-width:1; opacity:.5; }
svg .reach { stroke-width:1.3; opacity:.8; } svg .dashed { stroke-dasharray:6 3; } svg .dotted { stroke-dasharray:1 3; }
"""

_TEXT = """
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; scroll-behavior:smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior:auto; } }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 var(--sans); }
.wrap { max-width:1040px; margin:0 auto; padding:0 20px; }
a { color:var(--tuned); text-underline-offset:3px; }
h1,h2,h3 { font-family:var(--serif); font-weight:600; line-height:1.2; letter-spacing:-.01em; text-wrap:balance; }
h1 { font-size:clamp(1.7rem,4.6vw,2.5rem); margin:.15em 0 .3em; }
h2 { font-size:1.5rem; margin:0 0 .25em; }
h3 { font-size:1.1rem; margin:1.8em 0 .5em; }
.eyebrow { font-size:.76rem; letter-spacing:.09em; text-transform:uppercase; color:var(--soft); margin:0; }
.lead { color:var(--soft); max-width:68ch; margin:0 0 1.1rem; }
header { padding:44px 0 8px; }
.models { color:var(--soft); margin:0; overflow-wrap:anywhere; }
.models b { color:var(--ink); font-weight:600; }
nav { margin-top:18px; display:flex; flex-wrap:wrap; gap:4px 18px; font-size:.92rem; }
nav a { text-decoration:none; color:var(--soft); padding:4px 0; }
nav a:hover { color:var(--tuned); text-decoration:underline; }
section { padding:34px 0 6px; border-top:1px solid var(--line); margin-top:30px; }
.hero { display:grid; grid-template-columns:minmax(0,1.15fr) minmax(0,1fr); gap:28px; align-items:end;
  border-top:0; margin-top:0; padding-top:24px; }
.big { font:600 clamp(3rem,10vw,4.9rem)/1 var(--serif); letter-spacing:-.03em; margin:0;
  font-variant-numeric:lining-nums tabular-nums; }
.big.good { color:var(--good); } .big.bad { color:var(--bad); } .big.quiet { color:var(--ink); }
.big-note { color:var(--soft); margin:.5rem 0 0; max-width:46ch; }
.facts { display:grid; grid-template-columns:1fr 1fr; gap:0 22px; margin:0; }
.facts div { border-top:1px solid var(--line); padding:9px 0; }
.facts dt { color:var(--soft); font-size:.82rem; }
.facts dd { margin:0; font-variant-numeric:tabular-nums; overflow-wrap:anywhere; }
.scroll { overflow-x:auto; margin:0 0 .4rem; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline:2px solid var(--tuned); outline-offset:2px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.95rem; }
.note { color:var(--soft); font-size:.86rem; }
.note { margin:.5rem 0 0; max-width:76ch; }
th,td { text-align:right; padding:9px 12px; border-bottom:1px solid var(--line); white-space:nowrap; }
th { font-weight:500; color:var(--soft); font-size:.82rem; vertical-align:bottom; }
tbody th { text-align:left; color:var(--ink); font-size:.95rem; font-weight:500; }
th:first-child,td:first-child { text-align:left; padding-left:0; }
th:last-child,td:last-child { padding-right:0; }
tr.first th, tr.first td { font-weight:650; }
td .sub { color:var(--soft); font-weight:400; font-size:.88rem; }
td .fixed { display:inline-block; min-width:3.1em; }
.tag { font:500 .7rem/1 var(--sans); letter-spacing:.04em; padding:3px 7px; border-radius:99px; margin-left:8px;
  background:var(--quiet-wash); color:var(--soft); vertical-align:1px; }
.good-text { color:var(--good); } .bad-text { color:var(--bad); } .quiet-text { color:inherit; }
.strip { width:90px; height:16px; vertical-align:-3px; margin-right:8px; }
"""

_REST = """
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; font-size:.84rem; color:var(--soft); margin:0 0 6px; padding:0;
  list-style:none; }
.legend i { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:6px; vertical-align:-1px; }
.legend .base { background:var(--base); } .legend .tuned { background:var(--tuned); }
.legend .bad { background:var(--bad); }
.gallery { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr)); gap:18px; }
.pair { background:var(--card); border:1px solid var(--line); border-radius:10px; overflow:hidden; display:flex;
  flex-direction:column; }
.two { display:grid; grid-template-columns:1fr 1fr; gap:1px; background:var(--line); }
.two div { background:var(--card); }
.two span { display:block; padding:6px 14px 5px; font-size:.74rem; letter-spacing:.03em; color:var(--soft); }
.two img, .film img { width:100%; height:auto; display:block; }
img.tiny { image-rendering:pixelated; }
.film { margin-top:30px; }
.frames { display:grid; grid-template-columns:repeat(8,minmax(0,1fr)); gap:8px; }
.frames div { display:grid; gap:3px; border-radius:7px; overflow:hidden; }
.pair figcaption { padding:12px 14px 13px; display:flex; flex-direction:column; gap:6px; flex:1; }
.prompt { margin:0; font:500 1rem/1.35 var(--serif); overflow-wrap:anywhere; }
.meta { margin:0; color:var(--soft); font-size:.8rem; overflow-wrap:anywhere; }
.chips { display:flex; flex-wrap:wrap; gap:5px; margin:auto 0 0; padding:2px 0 0; list-style:none; font-size:.79rem;
  font-variant-numeric:tabular-nums; }
.chips li { padding:2px 8px; border-radius:99px; background:var(--quiet-wash); }
.chips li::after { content:" ="; color:var(--soft); } .chips .good::after { content:" \\25B4"; color:var(--good); }
.chips .bad::after { content:" \\25BE"; color:var(--bad); }
.chips .good:first-child { background:var(--good-wash); color:var(--good); }
.chips .bad:first-child { background:var(--bad-wash); color:var(--bad); }
.warning, .fine { padding:11px 15px; border-radius:0 8px 8px 0; margin:0 0 14px; max-width:80ch; }
.warning { border-left:3px solid var(--warn); background:var(--warn-wash); } .warning b { color:var(--warn); }
.fine { border-left:3px solid var(--good); background:var(--good-wash); }
.missing { color:var(--soft); font-style:italic; }
details { border:1px solid var(--line); border-radius:10px; background:var(--card); margin:0 0 12px; }
summary { cursor:pointer; padding:11px 16px; font-weight:500; }
details[open] > summary { border-bottom:1px solid var(--line); }
details > .inside { padding:14px 16px; }
.tree { margin:0; display:grid; grid-template-columns:minmax(0,max-content) minmax(0,1fr); gap:2px 20px;
  font-size:.92rem; }
.tree dt { color:var(--soft); overflow-wrap:anywhere; } .tree dd { margin:0; overflow-wrap:anywhere;
  font-variant-numeric:tabular-nums; }
.tree > .branch { grid-column:1 / -1; color:var(--ink); font-weight:500; margin-top:10px; }
.tree > .nested { grid-column:1 / -1; padding-left:14px; border-left:2px solid var(--line); margin:2px 0 6px; }
pre { margin:0; overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:12px 14px; font:.86rem/1.5 var(--mono); }
footer { color:var(--soft); font-size:.86rem; padding:26px 0 60px; border-top:1px solid var(--line); margin-top:40px; }
@media (max-width:680px) { .frames { grid-template-columns:repeat(4,minmax(0,1fr)); }
  .hero { grid-template-columns:minmax(0,1fr); gap:20px; } .wrap { padding:0 16px; }
  header { padding-top:28px; } section { padding-top:26px; margin-top:24px; } th,td { padding:8px 9px; }
  .panel { padding:12px 12px 10px; } }
@media print { nav { display:none; } .panel,.pair,details { break-inside:avoid; } }
"""

CSS = PALETTE + _TEXT + CHARTS + _REST
