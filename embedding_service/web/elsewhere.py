"""What to call instead of a path that this service does not have."""

import re

from flask import current_app

from embedding_service.words import nearest

# What other services do at a path, and this one does not.
INSTEAD = {
    r"/v1/v1/": "the base URL has /v1 twice: the client adds it, so leave it out of the base URL",
    r"(/v\d)?/api/v\d/": "the base URL has the path of another API; use that of this service alone",
    r"rerank": "this service does not rerank; POST /similarity compares a sentence with others",
    r"chat|completions|generate|responses": (
        "this service embeds texts and generates none; embed with POST /v1/embeddings or POST /api/embed"
    ),
    r"sparse": "this service has no sparse vectors; POST /embed returns dense ones",
    r"classif|moderations|predict": "this service does not classify texts; POST /embed returns their vectors",
    r"images|audio|multimodal": "this service embeds texts only, with POST /v1/embeddings",
    r"/api/(copy|create|push|blobs)": "this service serves the one model that it was started with",
}


def instead(path: str) -> str:
    """A sentence for an unknown path."""
    for pattern, sentence in INSTEAD.items():
        if re.search(pattern, path):
            return f"there is no {path[:100]}: {sentence}"
    known = tuple(rule.rule for rule in current_app.url_map.iter_rules() if "<" not in rule.rule)
    meant = nearest(path[:100], known)
    embeds = "this service embeds texts: POST /embed, /v1/embeddings, /api/embed and others (GET /docs)"
    return f"there is no {path[:100]}; {f'perhaps {meant} is meant' if meant else embeds}"
