"""The pages of `data annotate`: plain HTML, one script and one style in the page itself, pictures by number.

Captions come from strangers: they enter through `escape` and stand in text only, never in the script.
"""

from __future__ import annotations

import base64
import hashlib

from diffusion_align.commands.annotate.choices import Row
from diffusion_align.commands.annotate.questions import Picture
from diffusion_align.evaluation import escape
from diffusion_align.evaluation.style import STYLE

CAPTION_LIMIT = 5000  # characters shown

_STYLE = (
    STYLE
    + """
main{max-width:none;padding:1rem 1.25rem}
.top{display:flex;gap:1rem;align-items:center;font-size:.88rem;color:var(--soft);font-variant-numeric:tabular-nums}
progress{flex:1;height:.35rem;accent-color:var(--c0)}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--rule);border-radius:.4rem;
padding:.25rem .8rem;cursor:pointer}
.caption{font-size:1.2rem;line-height:1.4;margin:1rem auto;max-width:60rem;max-height:18vh;overflow:auto;
text-align:center;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.shelf{display:flex;flex-wrap:wrap;justify-content:center;gap:1.25rem}
.tile{position:relative;padding:.5rem .5rem .3rem}
.tile img{width:min(42vw,60vh);height:min(42vw,60vh);object-fit:contain}
.many .tile img{width:min(28vw,33vh);height:min(28vw,33vh)}
.tile:hover,.tile:focus-visible,.tile.chosen{border-color:var(--c0);outline:2px solid var(--c0)}
.won{position:absolute;top:1rem;right:1rem;padding:0 .55rem;border-radius:1rem;
background:var(--c0);color:var(--paper);font-weight:600}
.won:empty{display:none}
.said{min-height:1.6em;text-align:center;margin:.75rem 0}
.keys{text-align:center;color:var(--soft);font-size:.85rem}
kbd{font:inherit;border:1px solid var(--rule);border-bottom-width:2px;border-radius:.3rem;padding:0 .4rem;
background:var(--card);color:var(--ink)}
""".replace("\n", "")
)

# Marks in a ranking are the script's own numbers; nothing that it writes into the page is parsed as HTML.
_SCRIPT = """
"use strict";
const page = document.body.dataset, at = Number(page.at), questions = Number(page.questions);
const tiles = [...document.querySelectorAll(".tile")], said = document.getElementById("said");
let picked = [], since = null, busy = false;
const place = number => page.base + number;
const mark = () => tiles.forEach((tile, i) => {
  const rank = picked.indexOf(i);
  tile.classList.toggle("chosen", rank >= 0);
  tile.querySelector(".won").textContent = rank < 0 ? "" : page.mode === "rank" ? rank + 1 : "\\u2713";
});
async function post(where, body) {
  if (busy) return;
  busy = true;
  try {
    const reply = await fetch(place(where), {method: "POST", body: JSON.stringify(body)});
    const answer = await reply.json();
    if (reply.ok && answer.next) return location.assign(place(answer.next));
    said.textContent = answer.said;
    if (answer.stopped) return;
  } catch (error) {
    said.textContent = "Not stored: the command does not answer. Start it again, and open its new address.";
  }
  busy = false;
  if (picked.length) { picked = []; mark(); }
}
const send = choice => since !== null &&
  post(at, {choice, picked: choice === "pick" ? picked : [], seconds: (performance.now() - since) / 1000});
function pick(i) {
  if (busy || since === null || i >= tiles.length || picked.includes(i)) return;
  picked.push(i);
  mark();
  if (page.mode === "best" || picked.length === tiles.length - 1) send("pick");
}
function undo() {
  if (!picked.length || busy) return post("undo", {});
  picked.pop();
  mark();
}
const go = number => { if (number >= 1 && number <= questions + 1 && number !== at) location.assign(place(number)); };
const keys = {
  t: () => tiles.length && send(picked.length ? "pick" : "tie"), s: () => tiles.length && send("skip"),
  u: undo, backspace: undo, arrowleft: () => go(at - 1), arrowright: () => go(at + 1),
};
document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const digit = /^[1-9]$/.test(event.key) ? event.key : (/^Digit([1-9])$/.exec(event.code) || [])[1];
  const act = digit ? () => pick(digit - 1) : keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
tiles.forEach((tile, i) => tile.addEventListener("click", () => pick(i)));
document.getElementById("stop").addEventListener("click", () => post("stop", {}));
// A page that a browser kept would show the answers of back then.
window.addEventListener("pageshow", event => { if (event.persisted) location.reload(); });
// Nothing is chosen, and no time runs, before every picture is there to be seen.
window.addEventListener("load", () => {
  for (const image of document.images) image.classList.toggle("crisp", image.naturalWidth <= 128);
  since = performance.now();
  for (const number of page.ahead.split(" ").filter(Boolean)) new Image().src = place("picture/" + number);
});
"""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# Only this script and this style act; pictures and answers go to the command itself, and nothing goes anywhere else.
POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def question_page(
    base: str,
    at: int,
    questions: int,
    decided: int,
    mode: str,
    shown: list[Picture],
    answer: Row | None,
    ahead: list[Picture],
) -> str:
    """The page of question `at`, from 1. `base` is the address of everything; `ahead` are pictures to fetch early."""
    marks, told = _told(answer, [picture.file for picture in shown])
    tiles = "".join(
        f'<button type="button" class="tile{" chosen" * bool(marks[i])}" aria-label="picture {i + 1}">'
        f'<img alt="" draggable="false" src="{base}picture/{picture.index}">'
        f'<kbd>{i + 1}</kbd><span class="won">{marks[i]}</span></button>'
        for i, picture in enumerate(shown)
    )
    shelf = f'<div class="shelf{" many" * (len(shown) > 2)}">{tiles}</div>'
    body = f'<p class="caption" dir="auto">{escape(shown[0].prompt, CAPTION_LIMIT)}</p>{shelf}'
    first = "".join(f"<kbd>{i + 1}</kbd> " for i in range(min(len(shown), 9)))
    pick = first + ("in order, the best first" if mode == "rank" else "the better" if len(shown) == 2 else "the best")
    tie = "the rest is a tie" if mode == "rank" else "tie"
    keys = f"{pick} · <kbd>t</kbd> {tie} · <kbd>s</kbd> skip · "
    return _page(base, at, questions, decided, mode, body, told, keys, " ".join(str(p.index) for p in ahead))


def last_page(base: str, questions: int, decided: int) -> str:
    """The page after the last question."""
    told = "Every question has an answer." if decided == questions else f"{questions - decided} are still open."
    body = '<p class="caption">That was the last one. Stop writes the files to train on; the arrows go back.</p>'
    return _page(base, questions + 1, questions, decided, "", body, told, "", "")


def _told(answer: Row | None, files: list[str]) -> tuple[list[str], str]:
    """What an answer puts on each picture, and in words below them."""
    if answer is None:
        return [""] * len(files), ""
    if answer["choice"] == "ranking":
        places = {file: i + 1 for i, tied in enumerate(answer["ranking"]) for file in tied}
        return [str(places[file]) for file in files], "Ranked. Another answer replaces it."
    if answer["choice"] == "winner":
        return ["✓" * (file == answer["winner"]) for file in files], "Chosen. Another answer replaces it."
    word = {"tie": "A tie.", "skip": "Skipped."}[answer["choice"]]
    return [""] * len(files), f"{word} Another answer replaces it."


def _page(
    base: str, at: int, questions: int, decided: int, mode: str, body: str, told: str, keys: str, ahead: str
) -> str:
    where = f"{at} of {questions}" if at <= questions else "end"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{where}</title><style>{_STYLE}</style></head>"
        f'<body data-base="{base}" data-at="{at}" data-questions="{questions}" data-mode="{mode}" data-ahead="{ahead}">'
        f'<main><div class="top"><span>{where}</span><progress max="{questions}" value="{decided}"></progress>'
        f'<span>{decided} decided</span><button type="button" id="stop">Stop</button></div>{body}'
        f'<p class="said" id="said" role="status">{told}</p>'
        f'<p class="keys">{keys}<kbd>u</kbd> or <kbd>Backspace</kbd> undo · '
        "<kbd>←</kbd> <kbd>→</kbd> back and forth</p>"
        f"</main><script>{_SCRIPT}</script></body></html>\n"
    )
