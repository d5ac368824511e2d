"""Lists the tokens of a text with their positions, for display, and decodes token ids."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from embedding_service.engine import Text, TokenizedText
from embedding_service.inference.preprocessing import check_unicode, decode_ids


class TokenLister:
    """Lists every token of a text with its position: slower than RustTokenizer, and never truncates."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` neither truncates nor pads."""
        self._tokenizer = tokenizer

    def decode(self, lists: Sequence[Text], skip_special_tokens: bool) -> list[str]:
        """The text of each list of ids. Raises InvalidRequest."""
        return decode_ids(self._tokenizer, lists, skip_special_tokens=skip_special_tokens)

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
