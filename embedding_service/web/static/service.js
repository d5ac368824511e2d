// The page's requests to the service, and their errors as readable messages.

const KEY = "api-key";

/** The key that the user entered, kept until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** A request that failed; `status` is 0 if there was no response. */
export class ServiceError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The absolute URL of a route, even if a proxy serves us below a path. */
export const address = (route) => new URL(route, document.baseURI).href;

/** State and reason of the service, from GET /health, which needs no key. */
export async function health() {
  try {
    const response = await fetch(address("health"), { cache: "no-store" });
    return await response.json();
  } catch {
    return { status: "unreachable", reason: "The service does not respond. Is it still running?" };
  }
}

/** GET /info. */
export const info = () => ask("info", {});

/** POST /embed with `body`, a string of JSON. */
export const embed = (body) =>
  ask("embed", { method: "POST", body, headers: { "Content-Type": "application/json" } });

// Headers are bytes, so each byte of the key's UTF-8 is sent as one character.
const bearer = (value) => `Bearer ${String.fromCharCode(...new TextEncoder().encode(value))}`;

/** The header that carries the key, if there is one. */
export const authorization = () => (key.get() ? { Authorization: bearer(key.get()) } : {});

async function ask(route, { headers, ...rest }) {
  let response;
  try {
    response = await fetch(address(route), { ...rest, headers: { ...headers, ...authorization() } });
  } catch {
    throw new ServiceError("The service did not respond. Is it still running?", 0);
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new ServiceError(words(response, answer), response.status);
  return answer;
}

function words(response, answer) {
  const message =
    typeof answer.error === "string" ? sentence(answer.error) : `The service responded with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  const advice = wait && [429, 503].includes(response.status) ? ` Try again in ${wait} s.` : "";
  const id = response.status >= 500 ? response.headers.get("X-Request-ID") : null;
  return message + advice + (id ? ` (Request ${id})` : "");
}

function sentence(words) {
  return words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
}
