"""Colours, style sheet and script of the pages; everything is inlined, nothing is fetched."""

COLOURS = {
    "bg": ("#fbfbfa", "#15171a"), "card": ("#ffffff", "#1d2024"), "ink": ("#1c2024", "#e8eaed"),
    "muted": ("#6b7280", "#9aa2ad"), "grid": ("#e3e5e8", "#33383f"), "shade": ("#eef0f4", "#262b33"),
    "shade-key": ("#d5dae3", "#3a424e"), "accent": ("#2563c9", "#7fb0ff"), "good": ("#15803d", "#5fd08f"),
    "bad": ("#c0392b", "#ff8a7a"),
    "c1": ("#2563c9", "#6ea8ff"), "c2": ("#d9650a", "#ff9f4d"),
    "c3": ("#1a8f5c", "#4fd39a"), "c4": ("#8b3fc7", "#c58bff"),
    "c5": ("#cf2f6b", "#ff7fab"), "c6": ("#0f8aa3", "#4fcde0"),
    "c7": ("#8a7400", "#d8c04a"), "c8": ("#8c5a3c", "#d0a385"),
    "more": ("34 139 230", "77 171 247"), "less": ("232 89 12", "255 146 43"),
}
"""CSS variable -> (light, dark)."""

STYLE = """
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
nav{position:sticky;top:0;background:var(--bg);border-bottom:1px solid var(--grid);z-index:2;
 overflow-x:auto;white-space:nowrap}
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
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;
 padding:12px 14px 8px;min-width:0}
figcaption{margin-top:2px}
.plot{position:relative}
.plot svg{width:100%;height:auto;display:block}
.plot .at{position:absolute;top:0;bottom:12%;width:1px;background:var(--muted);pointer-events:none;
 display:none}
.plot .values{position:absolute;top:0;background:var(--card);border:1px solid var(--grid);border-radius:6px;
 padding:3px 8px;font-size:.76rem;pointer-events:none;display:none;white-space:nowrap;z-index:1;
 font-variant-numeric:tabular-nums}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:1px 14px;padding:0;margin:5px 0 3px;
 font-size:.8rem;color:var(--muted)}
.legend i,.values i{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--k);
 margin-right:5px;vertical-align:middle}
.legend i.block{height:10px}
.legend i.dash{background:repeating-linear-gradient(90deg,var(--k) 0 5px,transparent 5px 8px)}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:14px;
 align-items:start}
.sample{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px 14px;min-width:0}
.tag{font-size:.74rem;color:var(--muted);border:1px solid var(--grid);border-radius:99px;padding:0 8px;
 margin-left:6px;white-space:nowrap}
.sample img{display:block;margin:8px 0;image-rendering:pixelated;border-radius:4px;max-width:100%;height:auto}
.sample img.image{min-width:min(120px,100%)} .sample img.video{width:100%}
pre{margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.45 var(--mono)}
.prompt{color:var(--muted);border-left:3px solid var(--grid);padding-left:10px;max-height:11em;overflow:auto}
.facts{font-size:.8rem;color:var(--muted);border-top:1px solid var(--grid);padding-top:6px;margin-top:8px}
.tokens{font:12.5px/1.75 var(--mono);margin:4px 0 6px;white-space:pre-wrap;overflow-wrap:anywhere;
 max-height:24em;overflow:auto}
.tokens span{border-radius:3px;padding:1px 0}
.tokens .env{color:var(--muted);font-style:italic}
.key span{padding:0 8px;border-radius:3px}
details{margin:.6em 0} summary{cursor:pointer;color:var(--accent)}
@media(max-width:600px){main{padding:12px 12px 40px} nav div{padding:8px 12px} th,td{padding:5px 8px}
 figure,.sample{padding:10px} .half{display:none} h1{font-size:1.35rem}}
@media print{nav{display:none} figure,.sample{break-inside:avoid}}
"""

SCRIPT = """
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
