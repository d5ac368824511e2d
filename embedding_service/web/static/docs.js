// Shows the OpenAPI document. The page has its address, since a proxy may serve us below a path.
const address = document.currentScript.dataset.document;

Promise.all([import("./service.js"), import("./key.js")]).then(([{ key, authorization }, { showKeyForm }]) => {
  const $ = (id) => document.getElementById(id);

  async function show() {
    const answer = await fetch(address, { headers: authorization() });
    if (answer.status === 401) return showKeyForm();
    $("key-form").hidden = true;
    if (!answer.ok) {
      $("ui").textContent = `The service responded with status ${answer.status}.`;
      return;
    }
    // Swagger UI shows a title of its own.
    $("title").hidden = true;
    // The document gives the service's address relative to itself, and Swagger UI does not know its location.
    const servers = [{ url: new URL(".", answer.url).href.replace(/\/$/, "") }];
    SwaggerUIBundle({
      spec: { ...(await answer.json()), servers },
      dom_id: "#ui",
      deepLinking: true,
      // Each operation shows its own schemas; the list of all is long and says nothing more.
      defaultModelsExpandDepth: -1,
      tryItOutEnabled: true,
      requestInterceptor: (request) => {
        request.headers = { ...authorization(), ...request.headers };
        return request;
      },
    });
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const followScheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
  dark.addEventListener("change", followScheme);
  followScheme();
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    show();
  });
  show();
});
