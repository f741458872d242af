"use strict";
// The page shows one question at a time. It knows images by question and side only; which is whose stays on the server.

const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", t: "tie", b: "bad",
  u: "undo", Backspace: "undo",
};
const SMALL = 200; // pixels: images below are enlarged
const NAME = "annotator"; // kept for this tab, so that a reload goes on

const byId = (id) => document.getElementById(id);
const images = new Map(); // question -> its two images, of the question shown and the next one
let state = null; // what the server said last
let busy = false; // a request is on its way, or the images are

function show(id) {
  for (const each of ["start", "labelling", "done"]) byId(each).hidden = each !== id;
}

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

async function ask(path, body) {
  const options = body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  if (response.status === 409) return ask(stateOf(state.annotator)); // asked elsewhere meanwhile: go on from there
  const found = await response.json();
  if (!response.ok) throw new Error(Array.isArray(found.detail) ? found.detail[0].msg : found.detail);
  return found;
}

const stateOf = (name) => `/state?annotator=${encodeURIComponent(name)}`;

function load(question) {
  if (!images.has(question)) {
    images.set(question, ["left", "right"].map((side, place) => {
      const image = new Image();
      image.alt = `Image ${place + 1}`;
      image.decoding = "sync";
      image.src = `/image/${question}/${side}?annotator=${encodeURIComponent(state.annotator)}`;
      return image;
    }));
  }
  return images.get(question);
}

async function showQuestion() {
  const { id, prompt } = state.question;
  const pair = load(id);
  const missing = () => { throw new Error("An image cannot be shown. Reload the page; if that does not help, start the server again."); };
  await Promise.all(pair.map((image) => image.decode().catch(missing)));
  for (const image of pair) {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
  }
  const places = document.querySelectorAll(".image");
  pair.forEach((image, place) => {
    places[place].classList.remove("chosen");
    places[place].replaceChildren(image);
  });
  byId("prompt").textContent = prompt;
  byId("prompt").scrollTop = 0;
  for (const each of images.keys()) if (each !== id && each !== state.next) images.delete(each);
  if (state.next) load(state.next);
}

function showDone() {
  images.clear();
  byId("results").replaceChildren(...state.results.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  byId("export").textContent = state.export;
  show("done");
  byId("thanks").focus();
}

async function render() {
  sessionStorage.setItem(NAME, state.annotator);
  byId("annotator").textContent = state.annotator;
  byId("bar").max = state.total;
  byId("bar").value = state.answered;
  byId("count").textContent = `${Math.min(state.answered + 1, state.total)} of ${state.total}`;
  for (const button of document.querySelectorAll("[data-undo]")) button.disabled = state.answered === 0;
  if (!state.question) return showDone();
  const first = byId("labelling").hidden;
  show("labelling");
  await showQuestion();
  if (first) byId("prompt").focus();
}

// One thing at a time: keys that come while an answer is being saved or images are being loaded do nothing.
async function run(work) {
  if (busy) return;
  busy = true;
  const late = setTimeout(() => document.body.classList.add("waiting"), 150);
  try {
    state = await work();
    await render();
    say("");
  } catch (error) {
    const lost = error instanceof TypeError; // of fetch: nobody answers
    say(lost ? "The server does not answer, and the last answer was not saved. Start it again, then answer again." : error.message);
  } finally {
    clearTimeout(late);
    document.body.classList.remove("waiting");
    busy = false;
  }
}

function choose(choice) {
  if (!state) return;
  const question = state.question ? state.question.id : null;
  const annotator = state.annotator;
  if (choice === "undo") {
    if (state.answered > 0) run(() => ask("/undo", { annotator, question }));
  } else if (question) {
    const chosen = document.querySelector(`.image[data-choice="${choice}"]`);
    if (chosen && !busy) chosen.classList.add("chosen");
    run(() => ask("/answer", { annotator, question, choice })).then(() => chosen && chosen.classList.remove("chosen"));
  }
}

function begin(name) {
  run(() => ask(stateOf(name)));
}

function welcome() {
  state = null;
  sessionStorage.removeItem(NAME);
  images.clear();
  show("start");
  byId("name").focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement;
  if (typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey || !state) return;
  const choice = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!choice) return;
  event.preventDefault();
  choose(choice);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && "undo" in button.dataset) choose("undo");
  else if (button && button.dataset.choice) choose(button.dataset.choice);
});
byId("who").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(byId("name").value);
});
byId("switch").addEventListener("click", welcome);
byId("another").addEventListener("click", welcome);

const known = sessionStorage.getItem(NAME) || document.body.dataset.annotator;
if (known) begin(known);
else welcome();
