"""The HTML around the content: one file, no external resource, light and dark, readable on a phone."""
from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.metrics.accuracy import Accuracies, Cell, domains_of, mean_accuracy

_COLOURS = {  # name: (light, dark)
    "bg": ("#fbfbfa", "#15171a"), "card": ("#ffffff", "#1d2024"), "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#6b7280", "#9aa2ad"), "grid": ("#e3e5e8", "#33383f"), "shade": ("#eef0f4", "#262b33"),
    "shade-key": ("#d5dae3", "#3a424e"), "accent": ("#2563c9", "#7fb0ff"), "good": ("#15803d", "#5fd08f"),
    "bad": ("#c0392b", "#ff8a7a"),
    "c1": ("#2563c9", "#6ea8ff"), "c2": ("#d9650a", "#ff9f4d"), "c3": ("#1a8f5c", "#4fd39a"), "c4": ("#8b3fc7", "#c58bff"),
    "c5": ("#cf2f6b", "#ff7fab"), "c6": ("#0f8aa3", "#4fcde0"), "c7": ("#8a7400", "#d8c04a"), "c8": ("#8c5a3c", "#d0a385"),
    "more": ("34 139 230", "77 171 247"), "less": ("232 89 12", "255 146 43"),
}

_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 var(--font);overflow-wrap:break-word}
main{max-width:1160px;margin:0 auto;padding:20px 20px 60px}
h1{font-size:1.6rem;margin:.2em 0 .1em;line-height:1.2}
h2{font-size:1.2rem;margin:2.2em 0 .3em;scroll-margin-top:3em}
h3{font-size:.98rem;margin:0} h3 small{font-weight:400;color:var(--muted)}
code{font:.92em var(--mono)}
p{margin:.3em 0 .8em}
.quiet,figcaption,.note{color:var(--muted);font-size:.86rem}
nav{position:sticky;top:0;background:var(--bg);border-bottom:1px solid var(--grid);z-index:2;overflow-x:auto;white-space:nowrap}
nav div{max-width:1160px;margin:0 auto;padding:8px 20px}
nav a{color:var(--muted);text-decoration:none;margin-right:16px;font-size:.86rem}
nav a:hover{color:var(--ink)}
.state{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.8rem;vertical-align:middle;
 border:1px solid currentColor;margin-left:.4em;font-weight:500}
.finished{color:var(--good)}.running{color:var(--accent)}.interrupted{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:10px;margin:16px 0}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:9px 13px}
.tile b{display:block;font-size:1.3rem;line-height:1.3;font-weight:600}
.tile span{color:var(--muted);font-size:.8rem}
.scroll{overflow-x:auto;margin:.4em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child,.word{text-align:left}
th{color:var(--muted);font-weight:500;font-size:.86rem}
td small{color:var(--muted)} td.best{font-weight:650} td.best small{font-weight:400}
.up{color:var(--good)}.down{color:var(--bad)}
.left td,.left th{text-align:left;white-space:normal;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px 14px 8px;min-width:0}
figcaption{margin-top:2px}
.plot{position:relative}
.plot svg{width:100%;height:auto;display:block}
.plot .at{position:absolute;top:0;bottom:12%;width:1px;background:var(--muted);pointer-events:none;display:none}
.plot .values{position:absolute;top:0;background:var(--card);border:1px solid var(--grid);border-radius:6px;
 padding:3px 8px;font-size:.76rem;pointer-events:none;display:none;white-space:nowrap;z-index:1;
 font-variant-numeric:tabular-nums}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:1px 14px;padding:0;margin:5px 0 3px;font-size:.8rem;color:var(--muted)}
.legend i,.values i{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--k);margin-right:5px;vertical-align:middle}
.legend i.block{height:10px}
.legend i.dash{background:repeating-linear-gradient(90deg,var(--k) 0 5px,transparent 5px 8px)}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:14px;align-items:start}
.sample{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px 14px;min-width:0}
.tag{font-size:.74rem;color:var(--muted);border:1px solid var(--grid);border-radius:99px;padding:0 8px;margin-left:6px;white-space:nowrap}
.sample img{display:block;margin:8px 0;image-rendering:pixelated;border-radius:4px;max-width:100%;height:auto}
.sample img.image{min-width:min(120px,100%)} .sample img.video{width:100%}
pre{margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.45 var(--mono)}
.prompt{color:var(--muted);border-left:3px solid var(--grid);padding-left:10px;max-height:11em;overflow:auto}
.facts{font-size:.8rem;color:var(--muted);border-top:1px solid var(--grid);padding-top:6px;margin-top:8px}
.tokens{font:12.5px/1.75 var(--mono);margin:4px 0 6px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:24em;overflow:auto}
.tokens span{border-radius:3px;padding:1px 0}
.tokens .env{color:var(--muted);font-style:italic}
.key span{padding:0 8px;border-radius:3px}
details{margin:.6em 0} summary{cursor:pointer;color:var(--accent)}
@media(max-width:600px){main{padding:12px 12px 40px} nav div{padding:8px 12px} th,td{padding:5px 8px}
 figure,.sample{padding:10px} .half{display:none} h1{font-size:1.35rem}}
@media print{nav{display:none} figure,.sample{break-inside:avoid}}
"""

_SCRIPT = """
for(const plot of document.querySelectorAll('.plot')){
 const data=JSON.parse(plot.dataset.readout);if(!data.lines.length)continue;
 const at=plot.appendChild(Object.assign(document.createElement('div'),{className:'at'}));
 const box=plot.appendChild(Object.assign(document.createElement('div'),{className:'values'}));
 const hide=()=>{at.style.display=box.style.display='none'};
 plot.addEventListener('pointerleave',hide);
 plot.addEventListener('pointermove',event=>{
  const all=plot.getBoundingClientRect(),share=(event.clientX-all.left)/all.width,[a,b]=data.box;
  if(share<a||share>b)return hide();
  const [low,high]=data.range,x=low+(share-a)/(b-a)*(high-low);
  box.replaceChildren();let step=null;
  for(const line of data.lines){
   let k=0;line.x.forEach((v,i)=>{if(Math.abs(v-x)<Math.abs(line.x[k]-x))k=i});
   if(step===null||Math.abs(line.x[k]-x)<Math.abs(step-x))step=line.x[k];
   const row=document.createElement('div'),mark=document.createElement('i'),y=line.y[k];
   mark.style.setProperty('--k','var(--'+line.colour+')');
   row.append(mark,(line.label?line.label+' ':'')+(data.percent?(100*y).toFixed(1)+' %':
    Math.abs(y)>=1e4?Math.round(y).toLocaleString('en'):String(y)));box.append(row);}
  box.prepend('step '+step);at.style.display=box.style.display='block';
  const left=(a+(step-low)/(high-low)*(b-a))*all.width;at.style.left=left+'px';
  box.style.left=Math.max(0,left+8+box.offsetWidth>all.width?left-8-box.offsetWidth:left+8)+'px';});}
"""


def page(title: str, body: str, anchors: Sequence[tuple[str, str]] = (), refresh_s: int | None = None) -> str:
    """A whole document. ``anchors``: (id, label) of the navigation; ``refresh_s``: reload while a run lives."""
    def variables(column: int) -> str:
        return ";".join(f"--{name}:{pair[column]}" for name, pair in _COLOURS.items())

    links = "".join(f"<a href='#{a}'>{text(label)}</a>" for a, label in anchors)
    reload = f"<meta http-equiv='refresh' content='{refresh_s}'>" if refresh_s else ""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{text(title)}</title>"
            "<meta name='viewport' content='width=device-width,initial-scale=1'>"
            f"<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>{reload}<style>"
            ":root{--font:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;"
            "--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
            f"{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}{_STYLE}</style></head>"
            f"<body>{f'<nav><div>{links}</div></nav>' if links else ''}<main>{body}</main>"
            f"<script>{_SCRIPT}</script></body></html>\n")


def text(value: object) -> str:
    """Escaped for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def prose(value: str) -> str:
    """Escaped text in which `this` becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(value))


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Key numbers: (value, what it is)."""
    return "<div class='tiles'>" + "".join(f"<div class='tile'><b>{text(v)}</b><span>{text(k)}</span></div>"
                                           for v, k in facts) + "</div>"


def accuracy_html(table: Accuracies) -> str:
    """Policy x domain in percent with intervals and the gain over base; best of each column in bold."""
    domains = domains_of(table)
    heads = "".join(f"<th>{text(d)}</th>" for d in domains) + ("<th>mean</th>" if len(domains) > 1 else "")
    best = {d: max(row[d].avg for row in table.values() if d in row) for d in domains}
    means = {policy: mean_accuracy(row, domains) for policy, row in table.items()}
    best_mean = max((m for m in means.values() if m is not None), default=None)
    base, rows = table.get("base", {}), []
    for policy, row in table.items():
        cells = [_accuracy_cell(row.get(d), best[d], base.get(d) if policy != "base" else None) for d in domains]
        if len(domains) > 1:
            mean, base_mean = means[policy], means.get("base")
            cells.append(_accuracy_cell(None if mean is None else Cell(mean), best_mean,
                                        Cell(base_mean) if base_mean is not None and policy != "base" else None))
        rows.append(f"<tr><td>{text(policy)}</td>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table><thead><tr><th>policy</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _accuracy_cell(cell: Cell | None, best: float | None, base: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    half = ""
    if cell.low is not None and cell.high is not None:
        half = f" <small class='half'>±{100 * max(cell.high - cell.avg, cell.avg - cell.low):.1f}</small>"
    gain = "" if base is None else " " + difference_html(cell.avg - base.avg)
    kind = " class='best'" if best is not None and cell.avg >= best else ""
    return f"<td{kind}>{100 * cell.avg:.1f}{half}{gain}</td>"


def difference_html(difference: float) -> str:
    """A signed difference of accuracies in points, coloured."""
    kind = "up" if difference > 0 else "down" if difference < 0 else ""
    return f"<small class='{kind}'>{100 * difference:+.1f}</small>"


def key_value_table(values: Mapping[str, Any], heads: tuple[str, str] = ("field", "value")) -> str:
    """A two-column table."""
    rows = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in values.items())
    return (f"<div class='scroll'><table class='left'><thead><tr><th>{text(heads[0])}</th><th>{text(heads[1])}</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": 1}}`` as ``{"optimizer.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
