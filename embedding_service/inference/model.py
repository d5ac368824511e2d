"""A loaded model: everything that the batcher and the engine need, in one object that tests can build."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tokenizers import Tokenizer

from embedding_service.engine import EmbedRequest, ModelInfo, Text, TokenVectorsRequest, Vectors
from embedding_service.errors import InvalidRequest
from embedding_service.inference.budget import BatchBudget
from embedding_service.inference.preprocessing import Preprocessor
from embedding_service.inference.runtime import Stream
from embedding_service.inference.splitting import Splitter
from embedding_service.inference.token_list import TokenLister
from embedding_service.inference.tokenized import Rows

# The prompts for each input type; the first that the model has is used.
PROMPT_NAMES = {"query": ["query"], "document": ["document", "passage", "corpus"], None: []}


class Exact(Protocol):
    """What is computed in torch whatever the backend, one request at a time. Slow when first asked."""

    def embed_tokens(self, texts: Sequence[Text], prompt: str | None) -> list[Vectors]:
        """The vectors of each text's tokens, of shape (tokens, dimension); raises InvalidRequest."""

    def forward(self, one: Rows) -> Vectors:
        """The vector of one text, of shape (1, dimension), computed in float32 throughout."""


@dataclass(kw_only=True, eq=False)
class Model:
    """A model that is ready to run. Safe from any thread, except that each stream is driven by one at a time.

    All `streams` may run at once. `all_cores`, if there is one, computes a batch on every core: for a batch
    that nothing else runs or waits beside. No batch may hold more than `info.max_batch_tokens`, padding
    included; `budget` says how many it should hold. Vectors are of length 1 if they are `normalized`.
    """

    info: ModelInfo
    preprocessor: Preprocessor
    streams: Sequence[Stream]
    all_cores: Stream | None
    exact: Exact
    budget: BatchBudget
    normalized: bool
    # Whether the model runs on the CPU, whose cores everything else needs too.
    on_cpu: bool
    # Called from time to time; gives memory back if nothing has run for a while.
    rest: Callable[[], None] = lambda: None

    def prompt(self, request: EmbedRequest | TokenVectorsRequest) -> str | None:
        """The prompt as SentenceTransformer.encode, encode_query and encode_document choose it.

        Raises InvalidRequest for a name that the model lacks.
        """
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
        for name in PROMPT_NAMES[request.input_type]:
            if name in prompts:
                return prompts[name]
        return prompts.get(self.info.default_prompt_name or "")

    # Made when first needed, which for most services is never. Two threads may both make one; either will do.

    @cached_property
    def lister(self) -> TokenLister:
        """Lists the tokens of texts; raises InvalidRequest if the model's tokenizer cannot."""
        return TokenLister(self._plain_tokenizer)

    @cached_property
    def splitter(self) -> Splitter:
        """Cuts texts into pieces; raises InvalidRequest if the model's tokenizer cannot."""
        longest = None if self.info.reads_whole_texts else self.info.max_seq_length
        return Splitter(self._plain_tokenizer, longest)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return self.preprocessor.plain()
