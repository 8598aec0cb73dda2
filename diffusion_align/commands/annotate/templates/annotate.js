"use strict";
const page = document.body.dataset, at = Number(page.at), questions = Number(page.questions);
const tiles = [...document.querySelectorAll(".tile")], message = document.getElementById("message");
let picked = [], since = null, busy = false;
const place = number => page.base + number;
const mark = () => tiles.forEach((tile, i) => {
  const rank = picked.indexOf(i);
  tile.classList.toggle("chosen", rank >= 0);
  tile.querySelector(".won").textContent = rank < 0 ? "" : page.mode === "rank" ? rank + 1 : "\u2713";
});
async function post(where, body) {
  if (busy) return;
  busy = true;
  try {
    const reply = await fetch(place(where), {method: "POST", body: JSON.stringify(body)});
    const answer = await reply.json();
    if (reply.ok && answer.next) return location.assign(place(answer.next));
    message.textContent = answer.message;
    if (answer.stopped) return;
  } catch (error) {
    message.textContent = "Not stored: the command does not answer. Start it again, and open its new address.";
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
// A page that a browser kept would show old answers.
window.addEventListener("pageshow", event => { if (event.persisted) location.reload(); });
// Nobody can choose, and no time runs, before every picture is visible.
window.addEventListener("load", () => {
  for (const image of document.images) image.classList.toggle("crisp", image.naturalWidth <= 128);
  since = performance.now();
  for (const number of page.ahead.split(" ").filter(Boolean)) new Image().src = place("picture/" + number);
});
