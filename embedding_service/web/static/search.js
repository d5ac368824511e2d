// The Search tab: documents are embedded as they are added, and ranked while a query is typed.

import { element, number } from "./heatmap.js";
import { textsOf } from "./files.js";
import { ServiceError, embed } from "./service.js";

const MAX_DOCUMENTS = 5000;
const BATCH = 128;
const SHOWN = 20;
const NAMED = 3;
// How long after the last key press a query, or a change of the documents, is sent.
const QUERY_MS = 150;
const DOCUMENTS_MS = 400;

const $ = (id) => document.getElementById(id);
const documents = () => $("documents").value.split("\n").filter((line) => line.trim() !== "");

const EXAMPLE = [
  "How do I reset my password?",
  "The parcel arrived two days late.",
  "My account is locked after three attempts.",
  "Which plan includes phone support?",
  "The sign-in page shows an error.",
  "Can I change the delivery address?",
  "We were charged twice for one order.",
  "Where can I download my invoice?",
];
const EXAMPLE_QUERY = "I cannot log in";
// Hits of more characters are folded.
const FOLDED = 300;
// Where the boxes are kept, so that a reload does not lose them; closing the tab does.
const KEPT = ["documents", "query"];

// The vectors of the documents embedded so far, by text; null for one that cannot be embedded.
const known = new Map();
// Why documents could not be embedded, and which were truncated, by text.
const refused = new Map();
const truncated = new Set();
let onUnauthorized = () => {};
// Only the answers to the latest query and the latest documents are used.
let asked = 0;
let embedding = 0;
// Whether the latest documents could not all be embedded; the next query tries again.
let failed = false;

const show = (id, text) => {
  $(id).textContent = text;
  $(id).hidden = !text;
};

/** Connect the tab; `unauthorized` asks for a key. */
export function start(unauthorized) {
  onUnauthorized = unauthorized;
  $("documents").addEventListener("input", count);
  $("documents").addEventListener("input", later(embedDocuments, DOCUMENTS_MS));
  $("query").addEventListener("input", later(() => (failed ? embedDocuments() : search()), QUERY_MS));
  $("search-form").addEventListener("submit", (event) => event.preventDefault());
  $("documents-example").addEventListener("click", useExample);
  $("file").addEventListener("change", () => open($("file").files[0]));
  $("documents").addEventListener("dragover", (event) => event.preventDefault());
  $("documents").addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) event.preventDefault();
    if (file) open(file);
  });
  for (const name of KEPT) {
    $(name).value ||= sessionStorage.getItem(name) ?? "";
    $(name).addEventListener("input", keep);
  }
  count();
  clear();
  if ($("documents").value) embedDocuments();
}

function keep() {
  for (const name of KEPT) {
    try {
      if ($(name).value) sessionStorage.setItem(name, $(name).value);
      else sessionStorage.removeItem(name);
    } catch {
      // More than the browser keeps.
      sessionStorage.removeItem(name);
    }
  }
}

function useExample() {
  $("documents").value = EXAMPLE.join("\n");
  $("query").value = EXAMPLE_QUERY;
  embedDocuments();
}

function later(act, milliseconds) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, milliseconds);
  };
}

async function open(file) {
  if (!file) return;
  try {
    const texts = textsOf(file.name, await file.text());
    $("documents").value = texts.map((text) => text.replace(/\s+/g, " ")).join("\n");
    await embedDocuments();
  } catch (error) {
    fail(error.message);
  }
}

function count() {
  const all = documents().length;
  $("document-count").textContent = all === 1 ? "1 document" : `${all.toLocaleString("en")} documents`;
}

async function embedDocuments() {
  const mine = ++embedding;
  count();
  keep();
  const all = documents();
  failed = all.length > MAX_DOCUMENTS;
  if (failed) {
    return fail(`This page searches up to ${MAX_DOCUMENTS.toLocaleString("en")} documents; there are ${all.length.toLocaleString("en")}.`);
  }
  show("search-error", "");
  const missing = [...new Set(all)].filter((text) => !known.has(text));
  for (let first = 0; first < missing.length; first += BATCH) {
    const texts = missing.slice(first, first + BATCH);
    const answer = await ask(texts, "document", () => mine === embedding);
    if (mine !== embedding) return;
    failed = !answer;
    if (failed) return;
    texts.forEach((text, i) => known.set(text, answer.embeddings[i]));
    for (const { index, reason } of answer.errors ?? []) refused.set(texts[index], reason);
    for (const index of answer.usage.truncated) truncated.add(texts[index]);
    $("search-status").textContent = `${first + texts.length} of ${missing.length} documents embedded`;
  }
  await search();
}

async function search() {
  const mine = ++asked;
  const query = $("query").value.trim();
  if (!query || !documents().length) {
    clear();
    return showNotice();
  }
  const began = performance.now();
  const answer = await ask([query], "query", () => mine === asked);
  if (!answer) return;
  if (answer.errors?.length) return fail(`The query ${answer.errors[0].reason}.`);
  showNotice(answer.usage.truncated.length > 0);
  const ranked = numbered()
    .filter(({ text }) => known.get(text))
    .map((row) => ({ ...row, score: similarity(answer.embeddings[0], known.get(row.text)) }))
    .sort((a, b) => b.score - a.score);
  // No document has its vector yet. The search runs again once they are embedded.
  if (!ranked.length) return;
  show("search-error", "");
  $("search-empty").hidden = true;
  $("results").replaceChildren(...ranked.slice(0, SHOWN).map(result));
  $("search-status").textContent =
    `Top ${Math.min(SHOWN, ranked.length)} of ${ranked.length.toLocaleString("en")}, in ${Math.round(performance.now() - began)} ms.`;
}

const similarity = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** The documents with their line numbers in the box. */
const numbered = () =>
  $("documents").value.split("\n").flatMap((text, i) => (text.trim() === "" ? [] : [{ text, line: i + 1 }]));

/** Say which documents are left out or read only in part, and whether the query is. */
function showNotice(queryIsCut = false) {
  const rows = numbered();
  const out = rows.filter(({ text }) => refused.has(text));
  const cut = rows.filter(({ text }) => truncated.has(text)).map(({ line }) => line);
  const words = out.slice(0, NAMED).map(({ text, line }) => `Document ${line} is left out: it ${refused.get(text)}.`);
  if (out.length > NAMED) words.push(`${out.length - NAMED} more are left out.`);
  if (cut.length === 1) words.push(`Document ${cut[0]} is too long for the model, which reads only its beginning.`);
  if (cut.length > 1) {
    const names = cut.slice(0, NAMED).join(", ") + (cut.length > NAMED ? ", …" : "");
    words.push(`Documents ${names} are too long for the model, which reads only their beginning.`);
  }
  if (queryIsCut) words.push("The query is too long for the model, which reads only its beginning.");
  show("search-notice", words.join(" "));
}

/** The answer for texts; null if the request failed, or if `isLatest` says that it is no longer wanted. */
async function ask(texts, kind, isLatest) {
  try {
    const answer = await embed(JSON.stringify({ texts, input_type: kind, on_error: "null" }));
    return isLatest() ? answer : null;
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    if (!isLatest()) return null;
    if (error.status === 401) onUnauthorized();
    fail(error.message);
    return null;
  }
}

function result({ text, line, score }) {
  const item = element("li");
  const meter = element("span", { class: "meter" });
  meter.style.setProperty("--shade", `${(100 * Math.max(0, score)).toFixed(1)}%`);
  item.append(element("output", {}, number(score, 2)), found(text, line), meter);
  return item;
}

function found(text, line) {
  if (text.length <= FOLDED) {
    const whole = element("p", { class: "found" }, text);
    whole.prepend(element("b", { title: `Line ${line}` }, line), " ");
    return whole;
  }
  const folded = element("details", { class: "found" });
  const summary = element("summary", {}, `${text.slice(0, FOLDED)}…`);
  summary.prepend(element("b", { title: `Line ${line}` }, line), " ");
  folded.append(summary, element("p", {}, text));
  return folded;
}

function fail(message) {
  show("search-notice", "");
  // The answer to a query that is still on its way must not replace the error.
  asked++;
  clear();
  show("search-error", message);
}

function clear() {
  $("results").replaceChildren();
  const given = documents().length;
  $("search-empty").textContent = given
    ? "Enter a query to rank the documents by it."
    : "Enter documents, or try the example; the documents most similar to a query appear here.";
  $("search-empty").hidden = false;
  $("search-status").textContent = "";
}
