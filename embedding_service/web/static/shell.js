// The curl command that sends what the page has sent, quoted for a POSIX shell.

// Linux allows one argument 128 KiB; a longer body goes through standard input.
const LONGEST_ARGUMENT = 120_000;

/** One word of a shell command; nothing in it is special to the shell. */
export function quote(word) {
  return /^[\w/:.,=@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** The command for POST `url` with a JSON `body`; the key is named, not shown. */
export function curl(url, body, withKey) {
  const lines = [`curl ${quote(url)}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $API_KEY"');
  const isLong = new TextEncoder().encode(body).length > LONGEST_ARGUMENT;
  // JSON has no line break of its own, so no line of it can end the here-document.
  lines.push(isLong ? `--data-binary @- <<'JSON'\n${body}\nJSON` : `-d ${quote(body)}`);
  return lines.join(" \\\n  ");
}

/** The same in Python, with the package requests. */
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
