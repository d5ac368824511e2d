// Shows the OpenAPI document; its address stands in the page, since the service may live below a path.
const address = document.currentScript.dataset.document;

import("./service.js").then(async ({ key, authorization }) => {
  let answer = await fetch(address, { headers: authorization() });
  while (answer.status === 401) {
    key.forget();
    const typed = prompt("This service asks for an API key.");
    if (typed === null) break;
    key.set(typed.trim());
    answer = await fetch(address, { headers: authorization() });
  }
  if (!answer.ok) {
    document.getElementById("ui").textContent = `The service answered ${answer.status}.`;
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
});
