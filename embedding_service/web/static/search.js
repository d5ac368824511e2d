// The Search tab: documents are embedded as they are added, and ranked while a query is typed.

import { element, number } from "./heatmap.js";
import { textsOf } from "./files.js";
import { ServiceError, embed } from "./service.js";

const MAX_DOCUMENTS = 5000;
const BATCH = 128;
const SHOWN = 20;
// How long after the last key press a query, or a change of the documents, is sent.
const QUERY_MS = 150;
const DOCUMENTS_MS = 400;

const $ = (id) => document.getElementById(id);
const documents = () => $("documents").value.split("\n").filter((line) => line.trim() !== "");

// The vectors of the documents embedded so far, by text.
const known = new Map();
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
  $("file").addEventListener("change", () => open($("file").files[0]));
  $("documents").addEventListener("dragover", (event) => event.preventDefault());
  $("documents").addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) event.preventDefault();
    if (file) open(file);
  });
  count();
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
  const all = documents();
  failed = all.length > MAX_DOCUMENTS;
  if (failed) {
    return fail(`This page searches up to ${MAX_DOCUMENTS.toLocaleString("en")} documents; there are ${all.length.toLocaleString("en")}.`);
  }
  show("search-error", "");
  const missing = [...new Set(all)].filter((text) => !known.has(text));
  for (let first = 0; first < missing.length; first += BATCH) {
    const texts = missing.slice(first, first + BATCH);
    const vectors = await vectorsOf(texts, "document", () => mine === embedding);
    if (mine !== embedding) return;
    failed = !vectors;
    if (failed) return;
    texts.forEach((text, i) => known.set(text, vectors[i]));
    $("search-status").textContent = `${first + texts.length} of ${missing.length} documents embedded`;
  }
  await search();
}

async function search() {
  const mine = ++asked;
  const query = $("query").value.trim();
  if (!query || !documents().length) return clear();
  const began = performance.now();
  const vectors = await vectorsOf([query], "query", () => mine === asked);
  if (!vectors) return;
  const ranked = documents()
    .filter((text) => known.has(text))
    .map((text) => ({ text, score: similarity(vectors[0], known.get(text)) }))
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

/** The vectors of texts; null if the request failed, or if `isLatest` says that they are no longer wanted. */
async function vectorsOf(texts, kind, isLatest) {
  try {
    const answer = await embed(JSON.stringify({ texts, input_type: kind }));
    return isLatest() ? answer.embeddings : null;
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    if (!isLatest()) return null;
    if (error.status === 401) onUnauthorized();
    fail(error.message);
    return null;
  }
}

function result({ text, score }) {
  const item = element("li");
  const meter = element("span", { class: "meter" });
  meter.style.setProperty("--shade", `${(100 * Math.max(0, score)).toFixed(1)}%`);
  item.append(element("output", {}, number(score, 2)), element("p", { class: "found" }, text), meter);
  return item;
}

function fail(message) {
  // The answer to a query that is still on its way must not replace the error.
  asked++;
  clear();
  show("search-error", message);
}

function clear() {
  $("results").replaceChildren();
  $("search-empty").hidden = false;
  $("search-status").textContent = "";
}
