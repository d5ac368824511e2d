"""Models of the sizes of published ones with random weights: as fast as those; the vectors mean nothing."""

from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
QWEN = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_669,
}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}

NAMES = ("bge-base", "Qwen3-0.6B")


def build(name: str, folder: Path, tokenizer_of: Path, device: str, *, tiny: bool = False) -> Path:
    """Write a model in float16 with the tokenizer of another; returns its folder."""
    words = transformers.AutoTokenizer.from_pretrained(str(tokenizer_of))
    words.model_max_length = 512
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            if name == "bge-base":
                bert = {"vocab_size": len(words)} | (TINY if tiny else BERT)
                network = transformers.BertModel(transformers.BertConfig(**bert))
            else:
                words.padding_side = "left"
                qwen = QWEN | (TINY | {"head_dim": 8, "num_key_value_heads": 2} if tiny else {})
                network = transformers.Qwen3Model(transformers.Qwen3Config(**qwen))
    finally:
        torch.set_default_dtype(before)
    parts = folder / "parts"
    network.save_pretrained(parts)
    words.save_pretrained(parts)
    pooling = Pooling(network.config.hidden_size, "cls" if name == "bge-base" else "lasttoken")
    model = SentenceTransformer(modules=[Transformer(str(parts)), pooling, Normalize()], device="cpu")
    model.max_seq_length = 512
    model.save_pretrained(str(folder / "model"))
    return folder / "model"
