"""A loaded model: prompts, preparing of texts, lanes, and vectors computed again exactly."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from sentence_transformers import SentenceTransformer

from embedding_service.engine import (
    Chunk,
    EmbedRequest,
    ModelInfo,
    TokenizedText,
    TokenVectorsRequest,
    Vectors,
)
from embedding_service.errors import InvalidRequest
from embedding_service.inference.budget import BatchBudget
from embedding_service.inference.preprocessing import Preprocessor, check_unicode
from embedding_service.inference.runtime import Lane, Side
from embedding_service.inference.splitting import Splitter
from embedding_service.inference.token_list import TokenLister
from embedding_service.inference.tokenized import Rows, TokenizedTexts


@dataclass(kw_only=True, eq=False)
class Model:
    """A SentenceTransformer that is ready to run: the Runtime of a batcher. `loading.load` makes it."""

    sentence_transformer: SentenceTransformer
    preprocessor: Preprocessor
    lanes: list[Lane]
    whole: Lane | None
    exact: Lane
    max_seq_length: int
    max_batch_tokens: int
    budget: BatchBudget
    separate_bulk: bool
    normalized: bool
    uses_accelerator: bool
    info: ModelInfo
    # Token vectors are computed one request at a time, beside the lanes, in torch, whatever the backend.
    _tokens_lock: threading.Lock = field(default_factory=threading.Lock)

    def prompt(self, request: EmbedRequest | TokenVectorsRequest) -> str | None:
        """The prompt as SentenceTransformer.encode, encode_query and encode_document choose it."""
        prompts, prompt_name = self.info.prompts, request.prompt_name
        if request.prompt is not None:
            if prompt_name is not None:
                raise InvalidRequest("cannot be sent together with prompt_name", field="prompt")
            return request.prompt
        if prompt_name is not None:
            if prompt_name not in prompts:
                known = ", ".join(sorted(prompts)) or "none"
                raise InvalidRequest(
                    f"is {prompt_name!r}; the model's prompts are: {known}", field="prompt_name"
                )
            return prompts[prompt_name]
        names = {"query": ["query"], "document": ["document", "passage", "corpus"], None: []}
        for name in names[request.input_type]:
            if name in prompts:
                return prompts[name]
        default = self.sentence_transformer.default_prompt_name
        return prompts.get(default) if default is not None else None

    def prepare(
        self,
        texts: Sequence[str],
        prompt: str | None,
        task: str | None,
        side: Side | None = None,
        *,
        parallel: bool = False,
    ) -> TokenizedTexts:
        return self.preprocessor.prepare(texts, prompt, task, side, parallel=parallel)

    def list_tokens(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        return self._lister.list(texts, add_special_tokens)

    def split(self, texts: Sequence[str], request: EmbedRequest) -> list[list[Chunk]]:
        return self._splitter.split(texts, self.prompt(request), request.overlap)

    def embed_tokens(self, texts: Sequence[str], request: TokenVectorsRequest) -> list[Vectors]:
        check_unicode(texts)
        with self._tokens_lock:
            found = self.sentence_transformer.encode(
                list(texts), prompt=self.prompt(request), output_value="token_embeddings"
            )
        if not all(isinstance(one, torch.Tensor) and one.ndim == 2 for one in found):
            raise InvalidRequest("this model has no vectors of tokens")
        return [one.float().cpu().numpy() for one in found]

    def forward_exact(self, one: Rows) -> Vectors:
        return self.exact.forward([one])

    # Made when first needed, which for most services is never. Two threads may both make one; either will do.

    @cached_property
    def _lister(self) -> TokenLister:
        return TokenLister(self.sentence_transformer)

    @cached_property
    def _splitter(self) -> Splitter:
        return Splitter(
            self.sentence_transformer, None if self.info.reads_whole_texts else self.max_seq_length
        )
