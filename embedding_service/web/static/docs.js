// Shows the OpenAPI document; its address stands in the page, since the service may live below a path.
SwaggerUIBundle({
  url: document.currentScript.dataset.document,
  dom_id: "#ui",
  deepLinking: true,
  tryItOutEnabled: true,
});
