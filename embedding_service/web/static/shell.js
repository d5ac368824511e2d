// The page's request as code: curl for a POSIX shell, Python and JavaScript.

// Linux limits an argument to 128 KiB; a longer body is sent through standard input.
const MAX_ARGUMENT_BYTES = 120_000;

/** A word of a shell command, quoted if it has to be. */
export function quote(word) {
  return /^[\w/:.,=@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** The curl command for POST `url` with a JSON `body`; it takes the key from API_KEY. */
export function curl(url, body, withKey) {
  const lines = [`curl ${quote(url)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $API_KEY"');
  const isLong = new TextEncoder().encode(body).length > MAX_ARGUMENT_BYTES;
  // The JSON is a single line, so it cannot end the here-document early.
  lines.push(isLong ? `--data-binary @- <<'JSON'\n${body}\nJSON` : `-d ${quote(body)}`);
  return lines.join(" \\\n  ");
}

/** The same in Python, with the requests package. */
export function python(url, body, withKey) {
  const key = withKey ? '    headers={"Authorization": f"Bearer {os.environ[\'API_KEY\']}"},\n' : "";
  return (
    `${withKey ? "import os\n\n" : ""}import requests\n\n` +
    `answer = requests.post(\n    ${JSON.stringify(url)},\n    json=${body},\n${key}    timeout=60,\n)\n` +
    `answer.raise_for_status()\nvectors = answer.json()["embeddings"]`
  );
}

/** The same in JavaScript, in Node.js or a browser. */
export function javascript(url, body, withKey) {
  const key = withKey ? ",\n    Authorization: `Bearer ${process.env.API_KEY}`" : "";
  return (
    `const answer = await fetch(${JSON.stringify(url)}, {\n  method: "POST",\n` +
    `  headers: {\n    "Content-Type": "application/json"${key},\n  },\n  body: JSON.stringify(${body}),\n});\n` +
    `if (!answer.ok) throw new Error(await answer.text());\nconst { embeddings } = await answer.json();`
  );
}
