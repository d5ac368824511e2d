// The page: the service's state above, texts on the left, how alike they are on the right.

import { jsonl, npy, save } from "./files.js";
import { element, floor, heatmap, number, pairs, similarities } from "./heatmap.js";
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

const MOST_TEXTS = 100;
// A map of fewer texts shows nothing.
const LEAST_ON_MAP = 3;
const CODE = { curl, python, javascript };
const MOST_PAIRS = 5;
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
  // Written only when it changes: it is read out to those who cannot see it.
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
  // One try for each time it becomes healthy, and one for each key.
  knowsModel = true;
  try {
    const model = await info();
    $("longest").textContent = `${model.max_seq_length} tokens`;
    $("backend").textContent = `${model.backend}, ${model.model_dtype}`;
    $("version").textContent = `Version ${model.version}`;
    acceptKey();
    // A visitor sees at once what the page is for.
    if (!runs && $("texts").value === EXAMPLE.join("\n")) compare();
  } catch (error) {
    if (error.status === 401) askForKey();
    else knowsModel = false;
  }
}

// The API key

function askForKey() {
  const wasWrong = key.get() !== "";
  key.forget();
  $("forget").hidden = true;
  $("links").hidden = true;
  $("key-form").hidden = false;
  show("key-error", wasWrong ? "The service does not accept this key." : "");
  if (wasWrong) $("key").select();
  $("key").focus();
}

function acceptKey() {
  $("key-form").hidden = true;
  $("key").value = "";
  const hasKey = key.get() !== "";
  $("forget").hidden = !hasKey;
  // A browser follows a link without the key.
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

// Of several answers on their way only that to the last question counts.
let runs = 0;
let shown = null;

async function compare(event) {
  event?.preventDefault();
  const run = ++runs;
  show("error", "");
  const texts = lines();
  if (texts.length === 0) return show("error", "Type at least one text.");
  if (texts.length > MOST_TEXTS) {
    return show("error", `This page compares up to ${MOST_TEXTS} texts, and here are ${texts.length}.`);
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

// What is shown belongs to the texts that were compared, or there is nothing.
function clearAnswer() {
  $("matrix").replaceChildren();
  $("empty").hidden = false;
  $("legend").hidden = true;
  $("more").hidden = true;
  $("timing").textContent = "";
  show("readout", "");
  show("truncated", "");
}

function busy(is, byButton = false) {
  $("compare").disabled = is && byButton;
  $("compare").textContent = is ? "Comparing…" : "Compare";
  $("similarity").setAttribute("aria-busy", is);
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
  show("readout", "Point at a cell, or walk the cells with the arrow keys, to read a pair.");
  const { usage } = answer;
  $("timing").textContent =
    `${texts.length === 1 ? "1 text" : `${texts.length} texts`}, ${usage.tokens} tokens, ` +
    `${milliseconds(answer.processing_time_ms)} in the service, ${milliseconds(elapsed)} with the way there and back.`;
  showTruncated(texts, usage.truncated);
  showPairs(texts, pairs(matrix).slice(0, MOST_PAIRS));
  const onMap = texts.length >= LEAST_ON_MAP;
  $("map-card").hidden = !onMap;
  $("map").replaceChildren(...(onMap ? [draw(texts, answer.embeddings, $("map").clientWidth)] : []));
  $("map-list").replaceChildren(...(onMap ? legend(texts) : []));
}

const milliseconds = (value) => (value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`);

function showTruncated(texts, indices) {
  const which = indices.map((index) => index + 1).join(", ");
  const words = indices.length === 1 ? `Text ${which} is` : `Texts ${which} are`;
  const limit = $("longest").textContent;
  const most = limit === "–" ? "" : ` of ${limit}`;
  show("truncated", indices.length ? `${words} longer than the model reads: only the beginning${most} counts.` : "");
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
}

async function copyCurl() {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch {
    // Browsers give the clipboard to https and localhost only: there the text is marked instead.
    getSelection().selectAllChildren($("curl"));
    said = "Marked: press Ctrl C";
  }
  $("copy").textContent = said;
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
// After a reload browsers put back what was typed.
if (!$("texts").value) $("texts").value = EXAMPLE.join("\n");
countTexts();
poll();
