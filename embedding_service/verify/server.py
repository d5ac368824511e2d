"""A server that is verified: finds out which API it has, and asks it for vectors."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2
import numpy as np

from embedding_service.engine import Vectors
from embedding_service.errors import StartupError

SECONDS = 300.0


class Refused(Exception):
    """The server refuses this request; the message says how."""


class Api(NamedTuple):
    """An API: its path, the field for texts, where the vectors are, and its other fields.

    `prompt` and `dimensions` are its fields for a prompt and for shorter vectors, if it has them.
    """

    title: str
    path: str
    texts: str
    read: Callable[[Any], Any]
    others: dict[str, Any]
    prompt: str | None = None
    dimensions: str | None = None


def _data(answer: Any) -> Any:
    return [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]


OPENAI = {"model": "", "encoding_format": "float"}
COHERE = {"model": "", "input_type": "search_document", "embedding_types": ["float"]}
# In the order in which a server is asked: those that say most about themselves first.
APIS = [
    Api("the native API", "embed", "texts", lambda answer: answer["embeddings"], {}, "prompt", "dimensions"),
    Api("Text Embeddings Inference", "embed", "inputs", lambda answer: answer, {"truncate": True}),
    Api("OpenAI", "v1/embeddings", "input", _data, OPENAI, None, "dimensions"),
    Api("OpenAI", "embeddings", "input", _data, OPENAI, None, "dimensions"),
    Api(
        "Ollama", "api/embed", "input", lambda answer: answer["embeddings"], {"model": ""}, None, "dimensions"
    ),
    Api("Cohere", "v2/embed", "texts", lambda answer: answer["embeddings"]["float"], COHERE),
]
# Where a server lists its models, and where in the answer their names are.
LISTS = [("v1/models", "data", "id"), ("models", "data", "id"), ("api/tags", "models", "name")]


class Server:
    """A server of embeddings; safe to use from several threads."""

    def __init__(self, url: str, key: str | None, model: str) -> None:
        """Finds its API. Raises StartupError if it has none that is known."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = (url if "://" in url else f"http://{url}").rstrip("/") + "/"
        try:
            self._client = httpx2.Client(base_url=base, headers=headers, timeout=SECONDS)
            self._model = self._served() or model
            self.api = self._api()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StartupError(f"{url} does not answer: {error or type(error).__name__}") from None

    def embed(self, texts: list[str], **fields: Any) -> Vectors:
        """The vectors as float32 of shape (texts, numbers). Raises Refused, also for anything but vectors."""
        return self._ask(self.api, texts, fields)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _served(self) -> str | None:
        for path, models, name in LISTS:
            answer = self._client.get(path)
            with contextlib.suppress(ValueError, LookupError, TypeError):
                return str(answer.json()[models][0][name])
        return None

    def _api(self) -> Api:
        said = []
        for api in APIS:
            try:
                self._ask(api, ["a", "text"], {})
            except Refused as refusal:
                said.append(f"/{api.path} {refusal}")
            else:
                return api
        raise StartupError("no known API of embeddings answers: " + "; ".join(said))

    def _ask(self, api: Api, texts: list[str], fields: dict[str, Any]) -> Vectors:
        body = {api.texts: texts, **api.others, **fields}
        if "model" in body:
            body["model"] = self._model
        try:
            answer = self._client.post(api.path, json=body)
        except httpx2.HTTPError as error:
            raise Refused(f"no answer: {error or type(error).__name__}") from None
        if answer.status_code != 200:
            raise Refused(f"{answer.status_code} {answer.text[:120]}")
        try:
            vectors = np.array(api.read(answer.json()), np.float32)
        except (ValueError, LookupError, TypeError):
            raise Refused(f"200 without vectors: {answer.text[:60]}") from None
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise Refused(f"an array of shape {vectors.shape} for {len(texts)} texts")
        return vectors
