// Shows the OpenAPI document; its address stands in the page, since the service may live below a path.
const address = document.currentScript.dataset.document;

import("./service.js").then(({ key, authorization }) => {
  const $ = (id) => document.getElementById(id);

  async function show() {
    const answer = await fetch(address, { headers: authorization() });
    if (answer.status === 401) return askForKey();
    $("key-form").hidden = true;
    if (!answer.ok) {
      $("ui").textContent = `The service answered ${answer.status}.`;
      return;
    }
    // The document's own address of the service is relative to the document, which Swagger UI is not told.
    const servers = [{ url: new URL(".", answer.url).href.replace(/\/$/, "") }];
    SwaggerUIBundle({
      spec: { ...(await answer.json()), servers },
      dom_id: "#ui",
      deepLinking: true,
      tryItOutEnabled: true,
      requestInterceptor: (request) => {
        request.headers = { ...authorization(), ...request.headers };
        return request;
      },
    });
  }

  function askForKey() {
    const wasWrong = key.get() !== "";
    key.forget();
    $("key-form").hidden = false;
    $("key-error").hidden = !wasWrong;
    $("key-error").textContent = wasWrong ? "The service does not accept this key." : "";
    $("key").select();
    $("key").focus();
  }

  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    show();
  });
  show();
});
