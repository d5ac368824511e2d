// The similarity matrix: a coloured table that can be read with the pointer or the arrow keys.

// With more texts, the cells are too narrow for numbers.
const MAX_WITH_NUMBERS = 12;

/** The cosine similarities of all pairs of `vectors`, which have length 1, as rows of numbers. */
export function similarities(vectors) {
  return vectors.map((a) => vectors.map((b) => a.reduce((sum, value, i) => sum + value * b[i], 0)));
}

/** All pairs of two texts, the most similar first. */
export function pairs(matrix) {
  const found = matrix.flatMap((row, i) =>
    row.slice(i + 1).map((similarity, offset) => ({ i, j: i + 1 + offset, similarity })),
  );
  return found.sort((a, b) => b.similarity - a.similarity);
}

/** The similarity at which the colours start: 0, or more if all texts are similar. */
export function floor(matrix) {
  const lowest = Math.min(1, ...pairs(matrix).map((pair) => pair.similarity));
  return lowest > 0.5 && lowest < 1 ? Math.floor(lowest * 10) / 10 : 0;
}

/** A table of `matrix`; `onRead(i, j)` is called when a cell is pointed at or gets the focus. */
export function heatmap(texts, matrix, onRead) {
  const low = floor(matrix);
  const table = element("table", { role: "grid", "aria-labelledby": "similarity-title" });
  table.classList.toggle("dense", texts.length > MAX_WITH_NUMBERS);

  const head = element("tr");
  head.append(element("td"), ...texts.map((_, j) => element("th", { scope: "col" }, j + 1)));
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);

  const cells = matrix.map((row, i) => {
    const line = element("tr");
    const label = element("th", { scope: "row", title: texts[i] });
    label.append(element("b", {}, i + 1), element("span", {}, texts[i]));
    const drawn = row.map((similarity, j) => cell(similarity, i, j, low));
    line.append(label, ...drawn);
    table.tBodies[0].append(line);
    return drawn;
  });

  cells[0][0].tabIndex = 0;
  const read = ({ target }) => {
    const { i, j } = target.dataset;
    if (i) onRead(Number(i), Number(j));
  };
  table.addEventListener("pointerover", read);
  table.addEventListener("focusin", read);
  table.addEventListener("click", ({ target }) => target.dataset.i && move(cells, target));
  table.addEventListener("keydown", (event) => onKey(event, cells));
  return table;
}

function cell(similarity, i, j, low) {
  const shown = number(similarity, 2);
  const drawn = element("td", { role: "gridcell", tabindex: -1, "aria-label": `${i + 1} and ${j + 1}: ${shown}` });
  Object.assign(drawn.dataset, { i, j });
  drawn.append(element("span", {}, shown));
  const shade = Math.min(1, Math.max(0, (similarity - low) / (1 - low)));
  drawn.style.setProperty("--shade", `${(100 * shade).toFixed(1)}%`);
  drawn.classList.toggle("self", i === j);
  drawn.classList.toggle("middle", shade >= 0.5);
  drawn.classList.toggle("strong", shade >= 0.575);
  drawn.classList.toggle("deep", shade >= 0.725);
  return drawn;
}

function onKey(event, cells) {
  const i = Number(event.target.dataset.i);
  const j = Number(event.target.dataset.j);
  const last = cells.length - 1;
  const to = {
    ArrowUp: [i - 1, j],
    ArrowDown: [i + 1, j],
    ArrowLeft: [i, j - 1],
    ArrowRight: [i, j + 1],
    Home: [i, 0],
    End: [i, last],
  }[event.key];
  if (!to || Number.isNaN(i)) return;
  event.preventDefault();
  const next = cells[to[0]]?.[to[1]];
  if (next) move(cells, next);
}

// Only the cell that was visited last can be reached with Tab.
function move(cells, next) {
  for (const cell of cells.flat()) cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** A similarity with `digits` decimals and a proper minus sign. */
export const number = (similarity, digits) => similarity.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace("-", "");

/** An element with attributes and a text. */
export function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.textContent = text;
  return made;
}
