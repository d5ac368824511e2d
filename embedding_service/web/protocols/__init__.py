"""One module per API, with its payloads, routes and errors."""
