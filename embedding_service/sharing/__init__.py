"""Shares one engine among processes: the model process, its supervisor, and the web workers' client."""
