"""What the API's description says of headers, of fields and of protocols, and an example of every body."""

from typing import Any

HEADERS = {
    "X-Request-ID": "The id of this request in the service's log: the caller's, if it sent one.",
    "Retry-After": "Seconds to wait before retrying.",
    "retry-after-ms": "Milliseconds to wait before retrying.",
    "x-model-fingerprint": "Changes whenever the vectors would. x-expect-fingerprint in a request pins it.",
    "x-compute-tokens": "Tokens read by the model.",
    "x-total-time": "Total time of the request in milliseconds.",
    "x-tokenization-time": "Time spent tokenizing, in milliseconds.",
    "x-queue-time": "Time spent in the queue, in milliseconds.",
    "x-inference-time": "Time spent in the model, in milliseconds.",
    "x-cache-hits": "Texts answered from the vector cache, if CACHE_MB is set.",
}
# A body for each route's type that is answered as it stands; a test sends them all.
_LIST = ["A cat sleeps.", "A kitten naps."]
EXAMPLES: dict[str, dict[str, Any]] = {
    "EmbedBody": {"texts": _LIST},
    "TEIEmbedBody": {"inputs": _LIST},
    "SimilarityBody": {"inputs": {"source_sentence": _LIST[0], "sentences": _LIST[1:]}},
    "TEIEmbedAllBody": {"inputs": _LIST},
    "TokenizeBody": {"inputs": _LIST},
    "DecodeBody": {"ids": [101, 7592, 102]},
    "OpenAIEmbedBody": {"input": _LIST},
    "OllamaEmbedBody": {"input": _LIST},
    "OllamaEmbeddingsBody": {"prompt": _LIST[0]},
    "WeaviateBody": {"text": _LIST[0]},
    "OllamaGenerateBody": {"model": "all-minilm", "keep_alive": 0},
    "CohereTokenizeBody": {"text": _LIST[0]},
    "CohereEmbedBody": {"texts": _LIST, "input_type": "search_document"},
    "VertexBody": {"instances": _LIST},
}
TAGS = {
    "Embedding service": "The service's own API, its health and its description.",
    "OpenAI": "OpenAI's embeddings and models, with the fields of Jina, Voyage and others.",
    "Text Embeddings Inference": "Hugging Face's Text Embeddings Inference.",
    "Ollama": "Ollama's embeddings and the routes that its clients ask first.",
    "Weaviate": "Weaviate's text2vec-transformers.",
    "Cohere": "Cohere's embed, versions 1 and 2.",
    "SageMaker and Vertex AI": "The routes that the two platforms choose.",
}
# What fields mean: of any struct, or of the one that is named.
FIELDS = {
    "normalize": "Scale each vector to length 1.",
    "prompt_name": "Name of one of the model's prompts (GET /info lists them).",
    "input_type": (
        "Use the model's own prompt for queries (query, search_query), for documents (document, passage, "
        "search_document), or the one of this name, if it has one. Images are not supported."
    ),
    "dimensions": "Truncate each vector to this many dimensions, then normalise it again.",
    "truncate": "Truncate over-long texts (true), at the end (END) or at the start (START), or refuse them.",
    "overflow": (
        "How to handle over-long texts: truncate them, return an error, embed them in pieces and return the "
        "mean, or return the vectors of the pieces (chunks, only on /embed)."
    ),
    "chunk_overlap": "Maximum number of tokens that neighbouring pieces share.",
    "priority": (
        "background requests wait for all others, and use what these leave of the model. "
        "Numbers are accepted and not used."
    ),
    "prompt": "Text to put in front of each text, as it is.",
    "on_error": "With null, a bad text gets null and an entry in errors; the others succeed.",
    "output": "With tokens, each text gets a list of vectors, one for each of its tokens.",
    "encoding_format": (
        "base64 is the vector's little-endian bytes: float32, unless `precision` says otherwise."
    ),
    "precision": (
        "Number format of the vectors. binary and ubinary pack the signs of eight dimensions into a byte; "
        "int8 and uint8 need INT8_RANGES."
    ),
    "truncation_direction": "The end at which over-long texts are truncated; by default the model's choice.",
    "model": "A name of the model. In a request any will do: there is only one, and the response names it.",
    "user": "Not used.",
    "output_dimension": "Voyage's and Cohere's name for dimensions.",
    "output_dtype": "Voyage's name for the number format of the vectors; see `precision` of /embed.",
    "embedding_type": "Jina's name for the number format or encoding of the vectors.",
    "normalized": "Jina's name for normalize.",
    "task": "Jina's way to choose the model's own prompt for queries or documents.",
    "truncation": "Voyage's name for truncate.",
    "truncate_prompt_tokens": "vLLM's name for truncate: -1, or at least the model's maximum.",
    "image": "Not supported: the model reads text.",
    "images": "Not supported: the model reads text.",
    "keep_alive": "Not used: the model is always loaded.",
    "options": "Options, most of them for generation; texts longer than num_ctx are refused.",
    "pooling_strategy": "The model's own pooling; masked_mean, Weaviate's default, also means that.",
    "embedding_types": "Number formats of the embeddings.",
    "max_tokens": "If set, at least the model's maximum.",
    "DecodeBody.ids": "The token ids of one text, or a list for each, in the model's own vocabulary.",
    "skip_special_tokens": "Leave special tokens out.",
    "TEIEmbedAllBody.truncate": "Over-long texts are truncated.",
    "OllamaEmbedBody.dimensions": "As `dimensions` of /embed; 0 means all.",
    "OllamaEmbeddingsBody.prompt": "The text.",
    "OllamaGenerateBody.prompt": "Must be empty: no text is generated.",
    "OllamaNameBody.name": "Older clients' name for model.",
    "OllamaGenerateBody.name": "Older clients' name for model.",
    "WeaviateConfig.task_type": "Use the model's own prompt for queries or documents.",
    "VertexInstance.task_type": "Not supported; send parameters.prompt_name.",
    "ErrorAnswer.field": "The field that the error is about.",
    "ErrorAnswer.index": "The index of the item in that field.",
    "ErrorAnswer.reason": "The error without field and index.",
    "EmbedAnswer.embeddings": "One vector per text, in the order of the texts.",
    "EmbedAnswer.dimension": "Dimensions of a vector (before packing, if it is binary).",
    "EmbedAnswer.chunks": "The piece of each vector, with overflow: chunks.",
    "EmbedAnswer.errors": "The texts without a vector, with on_error: null.",
    "Usage.tokens": "Tokens read, including special tokens and prompts.",
    "Usage.truncated": "Indices of the texts that were truncated; not with output: tokens.",
    "Usage.chunks": "Pieces embedded, with overflow: mean or chunks.",
    "CohereEmbedAnswer.embeddings": 'By number format: {"float": [[…], …]}; or the bare list.',
}
