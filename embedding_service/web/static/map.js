// The texts as points in a plane: the two directions in which their vectors differ most (PCA).

import { element } from "./heatmap.js";

const HEIGHT = 360;
const MARGIN = 20;
const ROUNDS = 100;
const RADIUS = 11;
const SPREAD_ROUNDS = 200;

/** Two coordinates for each of `vectors`, by power iteration on the centred Gram matrix. */
export function project(vectors) {
  const count = vectors.length;
  const mean = vectors[0].map((_, k) => vectors.reduce((sum, vector) => sum + vector[k], 0) / count);
  const centred = vectors.map((vector) => vector.map((value, k) => value - mean[k]));
  const gram = centred.map((a) => centred.map((b) => dot(a, b)));
  const first = leading(gram);
  const second = leading(deflated(gram, first));
  return vectors.map((_, i) => [first, second].map(({ vector, value }) => vector[i] * Math.sqrt(Math.max(0, value))));
}

const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);

function leading(matrix) {
  // Not a constant vector: centring has removed that component from the matrix.
  let vector = matrix.map((_, i) => Math.sin(1 + 3 * i));
  let value = 0;
  for (let round = 0; round < ROUNDS; round++) {
    const next = matrix.map((row) => dot(row, vector));
    value = Math.sqrt(dot(next, next));
    if (value < 1e-12) return { vector: matrix.map(() => 0), value: 0 };
    vector = next.map((one) => one / value);
  }
  return { vector, value };
}

const deflated = (matrix, { vector, value }) =>
  matrix.map((row, i) => row.map((one, j) => one - value * vector[i] * vector[j]));

/** A drawing of the texts, `width` pixels wide; the numbers are those of the list. */
export function draw(texts, vectors, width) {
  const points = project(vectors);
  const [x, y] = [width, HEIGHT].map((length, axis) => scale(points.map((point) => point[axis]), length));
  const places = points.map((point) => [Number(x(point[0])), Number(y(point[1]))]);
  const labels = spread(places, width);
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    role: "img",
    "aria-label": `A map of ${texts.length} texts: the closer two points, the more similar their texts`,
  });
  places.forEach((place, i) => {
    const group = shape("g", { transform: `translate(${place[0]} ${place[1]})` });
    const title = shape("title", {});
    title.textContent = texts[i];
    const [dx, dy] = [labels[i][0] - places[i][0], labels[i][1] - places[i][1]];
    const label = shape("text", { x: dx, y: dy, dy: "0.35em" });
    label.textContent = i + 1;
    group.append(title);
    if (dx || dy) group.append(shape("circle", { r: 2.5, class: "dot" }), shape("line", { x2: dx, y2: dy }));
    group.append(shape("circle", { cx: dx, cy: dy, r: RADIUS }), label);
    svg.append(group);
  });
  return svg;
}

/** Where each label goes: at its point, or pushed aside by the labels that it would cover. */
function spread(places, width) {
  const labels = places.map((place) => [...place]);
  const apart = 2 * RADIUS + 1;
  const limit = [width, HEIGHT];
  for (let round = 0; round < SPREAD_ROUNDS; round++) {
    let moved = false;
    for (let i = 0; i < labels.length; i++) {
      for (let j = 0; j < i; j++) {
        const [dx, dy] = [labels[i][0] - labels[j][0], labels[i][1] - labels[j][1]];
        const distance = Math.hypot(dx, dy);
        if (distance >= apart) continue;
        moved = true;
        // Labels at the same place part at an angle that differs from pair to pair.
        const [ux, uy] = distance > 0.01 ? [dx / distance, dy / distance] : [Math.cos(i + j), Math.sin(i + j)];
        const push = (apart - distance) / 2 + 0.5;
        for (const [label, sign] of [[labels[i], 1], [labels[j], -1]]) {
          [ux, uy].forEach((step, axis) => {
            label[axis] = Math.min(limit[axis] - MARGIN, Math.max(MARGIN, label[axis] + sign * push * step));
          });
        }
      }
    }
    if (!moved) break;
  }
  return labels;
}

function scale(values, length) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  return (value) => (MARGIN + ((value - low) / span) * (length - 2 * MARGIN)).toFixed(1);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}

/** The list that the numbers on the map refer to. */
export function legend(texts) {
  return texts.map((text, i) => {
    const item = element("li", { title: text });
    item.append(element("b", {}, i + 1), text);
    return item;
  });
}
