"""A server that is verified: finds out which API it has, and asks it for vectors."""

import contextlib
from operator import itemgetter
from typing import Any, NamedTuple

import httpx2
import numpy as np

from embedding_service.engine import Vectors
from embedding_service.errors import StartupError


class Refused(Exception):
    """The server refuses this request; the message says how."""


class Api(NamedTuple):
    """An API: its path, its field for texts, the other fields of a body, and the options that it has."""

    title: str
    path: str
    texts: str
    others: dict[str, Any]
    options: tuple[str, ...] = ()


OPENAI = {"model": "", "encoding_format": "float"}
COHERE = {"model": "", "input_type": "search_document", "embedding_types": ["float"]}
# In the order in which a server is asked: those that say most about themselves first.
APIS = [
    Api("the native API", "embed", "texts", {}, ("prompt", "dimensions")),
    Api("Text Embeddings Inference", "embed", "inputs", {"truncate": True}),
    Api("OpenAI", "v1/embeddings", "input", OPENAI, ("dimensions",)),
    Api("OpenAI", "embeddings", "input", OPENAI, ("dimensions",)),
    Api("Ollama", "api/embed", "input", {"model": ""}, ("dimensions",)),
    Api("Cohere", "v2/embed", "texts", COHERE),
]
# Where a server lists its models, and where in the answer their names are.
LISTS = [("v1/models", "data", "id"), ("models", "data", "id"), ("api/tags", "models", "name")]


class Server:
    """A server of embeddings; safe to use from several threads."""

    def __init__(self, url: str, key: str | None, model: str) -> None:
        """Finds its API. Raises StartupError if it has none that is known."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base, self._model, refusals = url if "://" in url else f"http://{url}", model, []
        try:
            self._client = httpx2.Client(base_url=base, headers=headers, timeout=300)
            for path, models, name in LISTS:
                answer = self._client.get(path)
                with contextlib.suppress(ValueError, LookupError, TypeError):
                    self._model = str(answer.json()[models][0][name])
                    break
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StartupError(f"{url} does not answer: {error or type(error).__name__}") from None
        for self.api in APIS:
            try:
                self.embed(["a", "text"])
                return
            except Refused as refusal:
                refusals.append(f"/{self.api.path} {refusal}")
        raise StartupError("no known API of embeddings answers: " + "; ".join(refusals))

    def embed(self, texts: list[str], **options: Any) -> Vectors:
        """The vectors as float32 of shape (texts, numbers). Raises Refused, also for anything but vectors."""
        body = {self.api.texts: texts} | self.api.others | options
        if "model" in body:
            body["model"] = self._model
        try:
            answer = self._client.post(self.api.path, json=body)
            if answer.status_code != 200:
                raise Refused(f"{answer.status_code} {answer.text[:120]}")
            match answer.json():
                case {"data": data}:
                    found = [item["embedding"] for item in sorted(data, key=itemgetter("index"))]
                case {"embeddings": {"float": found}} | {"embeddings": found} | found:
                    pass
            vectors = np.array(found, np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError
            return vectors
        except httpx2.HTTPError as error:
            raise Refused(f"no answer: {error or type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise Refused(f"200 without a vector for each text: {answer.text[:60]}") from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
