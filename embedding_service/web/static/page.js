// The page: the service's state at the top, the texts on the left, their similarity on the right.

import { jsonl, npy, save } from "./files.js";
import { element, floor, heatmap, number, pairs, similarities } from "./heatmap.js";
import { showKeyForm } from "./key.js";
import { draw, legend } from "./map.js";
import { start as startSearch } from "./search.js";
import { ServiceError, address, embed, health, info, key } from "./service.js";
import { curl, javascript, python } from "./shell.js";

const EXAMPLE = [
  "A cat sleeps on the warm windowsill.",
  "The kitten is napping in the sun.",
  "Revenue rose by twelve percent this quarter.",
  "The company earned more than last year.",
  "How do I reset my password?",
  "I forgot my login and cannot sign in.",
];

const MAX_TEXTS = 100;
// A map of fewer texts shows nothing.
const MIN_ON_MAP = 3;
const CODE = { curl, python, javascript };
const MAX_PAIRS = 5;
const POLL_MS = { healthy: 5000, otherwise: 1000 };

const STATES = {
  healthy: "Healthy",
  loading: "Loading the model",
  unhealthy: "Unhealthy",
  draining: "Shutting down",
  unreachable: "No answer",
};

const $ = (id) => document.getElementById(id);

function show(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// The service's state

let knowsModel = false;

async function poll() {
  const answer = document.hidden ? null : await health();
  if (answer) showState(answer);
  if (answer?.status === "healthy" && !knowsModel) await showModel();
  if (answer && answer.status !== "healthy") knowsModel = false;
  setTimeout(poll, answer?.status === "healthy" ? POLL_MS.healthy : POLL_MS.otherwise);
}

function showState(answer) {
  const state = answer.status in STATES ? answer.status : "unhealthy";
  // Written only when it changes, because screen readers read out every update.
  if ($("status").dataset.state !== state) {
    $("status").dataset.state = state;
    $("status").textContent = STATES[state];
  }
  const reason = state === "healthy" ? "" : (answer.reason ?? "");
  if ($("reason").textContent !== reason) show("reason", reason);
  if (answer.model) {
    $("model").textContent = answer.model;
    $("device").textContent = answer.device;
    $("dimension").textContent = answer.embedding_dimension;
  }
}

async function showModel() {
  // Try once each time the service becomes healthy, and once for each key.
  knowsModel = true;
  try {
    const model = await info();
    $("longest").textContent = `${model.max_seq_length} tokens`;
    $("backend").textContent = `${model.backend}, ${model.model_dtype}`;
    $("version").textContent = `Version ${model.version}`;
    acceptKey();
    // Compare the example at once, so that visitors see what the page does.
    if (!runs && $("texts").value === EXAMPLE.join("\n")) compare();
  } catch (error) {
    if (error.status === 401) askForKey();
    else knowsModel = false;
  }
}

// The API key

function askForKey() {
  $("forget").hidden = true;
  $("links").hidden = true;
  showKeyForm();
}

function acceptKey() {
  $("key-form").hidden = true;
  $("key").value = "";
  const hasKey = key.get() !== "";
  $("forget").hidden = !hasKey;
  // Browsers do not send the key when they follow a link.
  $("links").hidden = hasKey;
}

async function useKey(event) {
  event.preventDefault();
  key.set($("key").value.trim());
  await showModel();
  if ($("key-form").hidden) $("texts").focus();
}

function forgetKey() {
  key.forget();
  $("forget").hidden = true;
  show("key-error", "");
  showModel();
}

// Texts

const lines = () => $("texts").value.split("\n").filter((line) => line.trim() !== "");

function countTexts() {
  const count = lines().length;
  $("count").textContent = count === 1 ? "1 text" : `${count} texts`;
  $("example").hidden = $("texts").value === EXAMPLE.join("\n");
}

function useExample() {
  $("texts").value = EXAMPLE.join("\n");
  countTexts();
  $("texts").focus();
  compare();
}

// Only the answer to the latest request is shown.
let runs = 0;
let shown = null;

async function compare(event) {
  event?.preventDefault();
  const run = ++runs;
  show("error", "");
  const texts = lines();
  if (texts.length === 0) return show("error", "Enter at least one text.");
  if (texts.length > MAX_TEXTS) {
    return show("error", `This page compares up to ${MAX_TEXTS} texts; there are ${texts.length}.`);
  }
  const body = JSON.stringify({ texts });
  busy(true, Boolean(event));
  try {
    const began = performance.now();
    const answer = await embed(body);
    if (run !== runs) return;
    shown = { texts, vectors: answer.embeddings, body };
    showAnswer(texts, answer, performance.now() - began);
    showCode();
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    if (run !== runs) return;
    clearAnswer();
    if (error.status === 401) askForKey();
    else show("error", error.message);
  } finally {
    if (run === runs) busy(false);
  }
}

// After an error, so that no old results are shown with new texts.
function clearAnswer() {
  $("matrix").replaceChildren();
  $("empty").hidden = false;
  $("legend").hidden = true;
  $("more").hidden = true;
  $("timing").textContent = "";
  $("beyond").hidden = true;
  show("readout", "");
  show("truncated", "");
}

function busy(isBusy, byButton = false) {
  $("compare").disabled = isBusy && byButton;
  $("compare").textContent = isBusy ? "Comparing…" : "Compare";
  $("similarity").setAttribute("aria-busy", isBusy);
}

// Results

function showAnswer(texts, answer, elapsed) {
  const matrix = similarities(answer.embeddings);
  $("empty").hidden = true;
  $("legend").hidden = false;
  $("more").hidden = false;
  $("low").textContent = floor(matrix);
  $("matrix").replaceChildren(
    heatmap(texts, matrix, (i, j) => {
      $("readout").textContent = `${number(matrix[i][j], 3)}  “${texts[i]}” and “${texts[j]}”`;
    }),
  );
  showBeyond();
  show("readout", `${matchMedia("(pointer: coarse)").matches ? "Tap" : "Point at"} a cell, or move with the arrow keys, to see its two texts.`);
  const { usage } = answer;
  $("timing").textContent =
    `${texts.length === 1 ? "1 text" : `${texts.length} texts`}, ${usage.tokens} tokens, ` +
    `${milliseconds(answer.processing_time_ms)} in the service, ${milliseconds(elapsed)} including the network.`;
  showTruncated(texts, usage.truncated);
  showPairs(texts, pairs(matrix).slice(0, MAX_PAIRS));
  const onMap = texts.length >= MIN_ON_MAP;
  $("map-card").hidden = !onMap;
  $("map").replaceChildren(...(onMap ? [draw(texts, answer.embeddings, $("map").clientWidth)] : []));
  $("map-list").replaceChildren(...(onMap ? legend(texts) : []));
}

// Scroll bars are often invisible until one scrolls.
function showBeyond() {
  const box = $("matrix");
  $("beyond").hidden = box.scrollWidth <= box.clientWidth && box.scrollHeight <= box.clientHeight;
}

const milliseconds = (value) => (value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`);

function showTruncated(texts, indices) {
  const which = indices.map((index) => index + 1).join(", ");
  const words = indices.length === 1 ? `Text ${which} is` : `Texts ${which} are`;
  const limit = $("longest").textContent;
  const part = limit === "–" ? "beginning" : `first ${limit}`;
  show("truncated", indices.length ? `${words} too long for the model, which reads only the ${part}.` : "");
}

function showPairs(texts, nearest) {
  const items = nearest.map(({ i, j, similarity }) => {
    const item = element("li");
    const meter = element("span", { class: "meter" });
    meter.style.setProperty("--shade", `${(100 * Math.max(0, similarity)).toFixed(1)}%`);
    const both = element("div", { class: "pair" });
    both.append(numbered(i, texts), numbered(j, texts));
    item.append(element("output", {}, number(similarity, 2)), both, meter);
    return item;
  });
  $("pairs").replaceChildren(...items);
  if (!items.length) $("pairs").append(element("li", { class: "muted" }, "Add a second text to compare it with."));
}

function numbered(index, texts) {
  const line = element("p");
  line.append(element("b", {}, index + 1), element("span", { title: texts[index] }, texts[index]));
  return line;
}

function showCode() {
  const withKey = key.get() !== "";
  const language = document.querySelector("[id^=code-][aria-selected=true]").id.replace("code-", "");
  $("curl").textContent = CODE[language](address("embed"), shown.body, withKey);
  $("curl").setAttribute("aria-labelledby", `code-${language}`);
  $("curl-help").hidden = !withKey;
}

// Tabs

function connectTabs(list, onSelect) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
    }
    onSelect(chosen);
  };
  if (location.hash && list.querySelector(`#tab-${CSS.escape(location.hash.slice(1))}`)) {
    select(list.querySelector(`#tab-${CSS.escape(location.hash.slice(1))}`));
  }
  list.addEventListener("click", ({ target }) => tabs.includes(target) && select(target));
  list.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.focus();
    select(next);
  });
}

function showPanel(tab) {
  for (const name of ["compare", "search"]) $(`panel-${name}`).hidden = tab.id !== `tab-${name}`;
  // A reload, or a link to it, shows the same tab.
  history.replaceState(null, "", tab.id === "tab-search" ? "#search" : location.pathname + location.search);
}

async function copyCurl() {
  let message = "Copied";
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch {
    // Browsers allow access to the clipboard only on https and localhost. Elsewhere, select the text.
    getSelection().selectAllChildren($("curl"));
    message = "Selected: press Ctrl C";
  }
  $("copy").textContent = message;
  setTimeout(() => ($("copy").textContent = "Copy"), 2000);
}

$("form").addEventListener("submit", compare);
$("texts").addEventListener("input", countTexts);
$("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare(event);
});
$("example").addEventListener("click", useExample);
$("key-form").addEventListener("submit", useKey);
$("forget").addEventListener("click", forgetKey);
$("copy").addEventListener("click", copyCurl);
$("save-npy").addEventListener("click", () => save(npy(shown.vectors), "vectors.npy"));
$("save-jsonl").addEventListener("click", () => save(jsonl(shown.texts, shown.vectors), "vectors.jsonl"));
const [panels, languages] = document.querySelectorAll("[role=tablist]");
connectTabs(panels, showPanel);
connectTabs(languages, showCode);
startSearch(askForKey);
if (navigator.platform.startsWith("Mac")) $("modifier").textContent = "⌘";
// After a reload, browsers restore what was typed.
if (!$("texts").value) $("texts").value = EXAMPLE.join("\n");
countTexts();
addEventListener("resize", showBeyond);
poll();
