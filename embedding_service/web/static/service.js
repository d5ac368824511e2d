// What the page asks of the service, and what went wrong in words.

const KEY = "api-key";

/** The key a person typed; it lives as long as the tab. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is not the one asked for; `status` is 0 where nobody answered. */
export class ServiceError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The absolute address of a route, also where a proxy serves us below a path. */
export const address = (route) => new URL(route, document.baseURI).href;

/** State and reason of the service, from GET /health, which asks for no key. */
export async function health() {
  try {
    const response = await fetch(address("health"), { cache: "no-store" });
    return await response.json();
  } catch {
    return { status: "unreachable", reason: "The service does not answer. Is it still running?" };
  }
}

/** GET /info. */
export const info = () => ask("info", {});

/** POST /embed with `body`, a JSON text. */
export const embed = (body) =>
  ask("embed", { method: "POST", body, headers: { "Content-Type": "application/json" } });

// A header is made of bytes: the key's UTF-8, each byte as one character.
const bearer = (value) => `Bearer ${String.fromCharCode(...new TextEncoder().encode(value))}`;

/** The header that carries the key, if there is one. */
export const authorization = () => (key.get() ? { Authorization: bearer(key.get()) } : {});

async function ask(route, { headers, ...rest }) {
  let response;
  try {
    response = await fetch(address(route), { ...rest, headers: { ...headers, ...authorization() } });
  } catch {
    throw new ServiceError("The service did not answer. Is it still running?", 0);
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new ServiceError(words(response, answer), response.status);
  return answer;
}

function words(response, answer) {
  const said = typeof answer.error === "string" ? sentence(answer.error) : `The service answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  const advice = wait && [429, 503].includes(response.status) ? ` Try again in ${wait} s.` : "";
  const id = response.status >= 500 ? response.headers.get("X-Request-ID") : null;
  return said + advice + (id ? ` (Request ${id})` : "");
}

function sentence(words) {
  return words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
}
