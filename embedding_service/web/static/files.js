// Reads documents from .txt, .csv and .jsonl files, and writes vectors as .npy and .jsonl.

/** The texts in a file, whose format its extension shows. Throws an Error with a readable message. */
export function textsOf(name, content) {
  // A PDF or another binary file would otherwise become documents of gibberish.
  if (/^%PDF-|\0/.test(content)) throw new Error(`${name} is not a text file; choose a .txt, .csv or .jsonl file.`);
  if (/\.(jsonl|ndjson)$/i.test(name)) return lines(content).map(fromJson);
  if (/\.csv$/i.test(name)) return fromCsv(content);
  return lines(content);
}

const lines = (content) => content.split(/\r?\n/).filter((line) => line.trim() !== "");

function fromJson(line, index) {
  let value;
  try {
    value = JSON.parse(line);
  } catch {
    throw new Error(`Line ${index + 1} is not JSON.`);
  }
  const text = typeof value === "string" ? value : value?.text;
  if (typeof text !== "string") throw new Error(`Line ${index + 1} has no field "text".`);
  return text;
}

function fromCsv(content) {
  const [head, ...rows] = records(content);
  const column = Math.max(0, head?.findIndex((name) => name.trim().toLowerCase() === "text") ?? 0);
  return rows.map((row) => row[column] ?? "").filter((text) => text.trim() !== "");
}

/** The records of a CSV file; fields may be quoted, and quoted fields may hold line breaks. */
function records(content) {
  const found = [[""]];
  let quoted = false;
  for (let at = 0; at < content.length; at++) {
    const one = content[at];
    const record = found.at(-1);
    if (one === '"' && quoted && content[at + 1] === '"') record[record.length - 1] += content[++at];
    else if (one === '"') quoted = !quoted;
    else if (one === "," && !quoted) record.push("");
    else if (one === "\n" && !quoted) found.push([""]);
    else if (one !== "\r" || quoted) record[record.length - 1] += one;
  }
  return found.filter((record) => record.length > 1 || record[0] !== "");
}

/** Rows of numbers as a .npy file of float32. */
export function npy(vectors) {
  const shape = `(${vectors.length}, ${vectors[0].length})`;
  const head = `{'descr': '<f4', 'fortran_order': False, 'shape': ${shape}, }`;
  // The header ends with a line break, at a multiple of 64 bytes.
  const padded = `${head.padEnd(Math.ceil((head.length + 11) / 64) * 64 - 11)}\n`;
  const start = new Uint8Array(10);
  start.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, padded.length & 255, padded.length >> 8]);
  const numbers = new DataView(new ArrayBuffer(4 * vectors.length * vectors[0].length));
  vectors.flat().forEach((value, i) => numbers.setFloat32(4 * i, value, true));
  return new Blob([start, padded, numbers], { type: "application/octet-stream" });
}

/** Texts and their vectors, one JSON object per line. */
export const jsonl = (texts, vectors) =>
  new Blob(texts.map((text, i) => `${JSON.stringify({ text, embedding: vectors[i] })}\n`), { type: "application/jsonl" });

/** Make the browser save a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
