"""One module per API: its payloads, its routes, its errors."""
