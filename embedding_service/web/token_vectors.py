"""Vectors of tokens, for uses such as late interaction: POST /embed_all, and `output: tokens` on /embed."""

from typing import Annotated, Any

import numpy as np
from flask import Response
from msgspec import Meta

from embedding_service.engine import TokenVectorsRequest, Vectors
from embedding_service.web.body import dump, json_response
from embedding_service.web.embedding import MATRIX, check_fingerprint, token_headers
from embedding_service.web.limits import check_texts
from embedding_service.web.request import current

Matrices = Annotated[Any, Meta(description="float32", extra_json_schema={"type": "array", "items": MATRIX})]


def ask_tokens(wanted: TokenVectorsRequest) -> list[Vectors]:
    """The vectors of each text's tokens. Raises TooLarge if there could be too many."""
    check_fingerprint()
    check_texts(wanted.texts)
    request = current()
    answer = request.service.call(wanted)
    request.tokens = len(answer.vectors)
    return np.split(answer.vectors, np.cumsum(answer.counts)[:-1])


def answer_tokens(body: Any) -> Response:
    """The body, with the headers of Text Embeddings Inference that have values: tokens and total time."""
    return json_response(dump(body), headers=token_headers(current()))
