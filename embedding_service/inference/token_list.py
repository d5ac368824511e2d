"""Lists the tokens of a text with their positions, for display."""

from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

from embedding_service.engine import TokenizedText
from embedding_service.errors import InvalidRequest
from embedding_service.inference.preprocessing import check_unicode


def untruncated_tokenizer(model: SentenceTransformer) -> Tokenizer:
    """A copy of the model's tokenizer that neither truncates nor pads.

    Raises InvalidRequest if it cannot tell where a token is in the text.
    """
    own: Any = getattr(model[0], "tokenizer", None)
    backend = getattr(own, "backend_tokenizer", own)
    if not isinstance(backend, Tokenizer):
        raise InvalidRequest("this model's tokenizer cannot list tokens")
    tokenizer: Tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TokenLister:
    """Lists every token of a text with its position: slower than RustTokenizer, and never truncates."""

    def __init__(self, model: SentenceTransformer) -> None:
        """Raises InvalidRequest if the model's tokenizer cannot tell token positions."""
        self._tokenizer = untruncated_tokenizer(model)

    def list(self, texts: Sequence[str], add_special_tokens: bool) -> list[TokenizedText]:
        """The tokens of each text, at offsets in its characters; raises InvalidRequest."""
        check_unicode(texts)
        listed = []
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens):
            special = {i: encoding.tokens[i] for i, flag in enumerate(encoding.special_tokens_mask) if flag}
            offsets = encoding.offsets
            starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
            listed.append(TokenizedText(encoding.ids, starts, stops, special))
        return listed
