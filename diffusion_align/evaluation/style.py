"""The report's look: system fonts, one column, quiet colours, light or dark as the reader's system is."""

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#26282b;--soft:#6d7278;--rule:#e4e4df;--card:#f5f5f1;
--up:#1e7d4b;--down:#b3402e;--c0:#2f6fa8;--c1:#c0703a;--c2:#4f8a5b;--c3:#8a5b9c}
@media (prefers-color-scheme:dark){:root{--paper:#16181a;--ink:#dcdedd;--soft:#8f959b;--rule:#2e3235;--card:#1e2123;
--up:#62c08d;--down:#e58472;--c0:#6fadde;--c1:#dd9b6a;--c2:#84bd8f;--c3:#bb91cb}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:3rem 1.25rem 5rem}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0 0 .75rem}
h2{font-size:1.15rem;margin:3.25rem 0 .35rem}
h3{font-size:.9rem;font-weight:600;color:var(--soft);margin:1.5rem 0 .5rem}
.lead{font-size:1.5rem;line-height:1.4;margin:0;max-width:44rem;text-wrap:pretty}
.note{color:var(--soft);font-size:.9rem;margin:0 0 .9rem;max-width:44rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th{font-weight:500;color:var(--soft);white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
.mark{width:7.5rem;height:1rem;vertical-align:middle;color:var(--soft)}
.mark line{stroke:currentColor;stroke-width:2}.mark .zero{stroke:var(--rule);stroke-width:1}
.mark circle{fill:currentColor}
.up{color:var(--up)}.down{color:var(--down)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17.5rem,1fr));gap:1rem}
figure{margin:0;padding:.75rem;background:var(--card);border-radius:.5rem}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.side{display:block;font-size:.78rem;color:var(--soft);margin-bottom:.25rem}
img{display:block;width:100%;border-radius:.25rem}.crisp{image-rendering:pixelated}
figcaption{font-size:.84rem;line-height:1.4;margin-top:.5rem;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.chart{width:100%;height:auto;display:block}
.rule{stroke:var(--rule);stroke-width:1}
.tick{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}.end{text-anchor:end}.mid{text-anchor:middle}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.band{fill:var(--c);opacity:.14}.dot{fill:var(--c)}
.legend{display:flex;gap:1.25rem;margin:.4rem 0 0;padding-left:4rem;font-size:.82rem;color:var(--soft)}
.legend span::before{content:"";display:inline-block;width:1rem;height:3px;margin-right:.4rem;vertical-align:middle;
background:var(--c)}
.choice{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:1.5rem 0 0;font-size:.9rem}
.choice+.choice{margin-top:.35rem}.choice+.grid{margin-top:1rem}
.choice input{position:absolute;opacity:0}
.choice label{color:var(--soft);cursor:pointer;padding:.2rem 0;border-bottom:2px solid transparent}
.choice input:checked+label{color:var(--ink);border-color:var(--c0)}
.choice input:focus-visible+label{outline:2px solid var(--c0);outline-offset:3px}
@media screen{main:has(#tab-result:checked) .panel:not(.tab-result),main:has(#tab-kinds:checked) .panel:not(.tab-kinds),
main:has(#tab-pictures:checked) .panel:not(.tab-pictures),main:has(#tab-how:checked) .panel:not(.tab-how){display:none}}
main:has(#by-gain:checked) figure{order:var(--g)}main:has(#by-loss:checked) figure{order:var(--l)}
main:has(#slider:checked) .two{display:block;position:relative;container-type:inline-size}
main:has(#slider:checked) .base{position:absolute;inset:0 auto auto 0;width:50cqw;max-width:100cqw;overflow:hidden;
resize:horizontal;border-right:2px solid var(--c1);white-space:nowrap}
main:has(#slider:checked) .two img{width:100cqw;max-width:none}
main:has(#slider:checked) .tuned .side{text-align:right}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.5rem;margin:0;font-size:.88rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--card);padding:1rem;border-radius:.5rem;font-size:.8rem;line-height:1.5;white-space:pre-wrap;
overflow-wrap:anywhere;margin:0}
""".replace("\n", "")
