"""Tiny SentenceTransformers of every kind, with random weights; encode() gives the expected vectors."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SENTENCE = (
    "the of and a in to it is was for on that query passage river model fox vector quick brown lazy dog"
)
WORDS = SENTENCE.split()
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?:'"
LONGEST = 48
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def tokenizer(special: dict[str, str], template: str, **arguments) -> transformers.PreTrainedTokenizerFast:
    """A WordPiece tokenizer whose special tokens have the first ids, in the given order."""
    tokens = [*dict.fromkeys(special.values()), *WORDS, *CHARACTERS, *(f"##{one}" for one in CHARACTERS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=template.replace("$A", "$A $B"),
        special_tokens=[(token, vocabulary[token]) for token in special.values()],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=LONGEST, **special, **arguments
    )


BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ROBERTA = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
CLIP = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
GEMMA = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
QWEN = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}


def transformer(folder: Path, model: transformers.PreTrainedModel, words) -> Transformer:
    """The first module, loaded from files like that of a published model."""
    folder.mkdir()
    # With the default initial scale, random layers are nearly the identity; these mix their tokens.
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(8)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return Transformer(str(folder))


def bert(folder: Path) -> Transformer:
    words = tokenizer(BERT, "[CLS] $A [SEP]")
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, **SIZES)
    return transformer(folder, transformers.BertModel(config), words)


def mpnet(folder: Path) -> Transformer:
    words = tokenizer(ROBERTA, "<s> $A </s>")
    words.model_input_names = ["input_ids", "attention_mask"]
    config = transformers.MPNetConfig(
        vocab_size=len(words), max_position_embeddings=66, pad_token_id=1, **SIZES
    )
    return transformer(folder, transformers.MPNetModel(config), words)


def roberta(folder: Path) -> Transformer:
    words = tokenizer(ROBERTA, "<s> $A </s>")
    words.model_input_names = ["input_ids", "attention_mask"]
    config = transformers.XLMRobertaConfig(
        vocab_size=len(words), max_position_embeddings=40, pad_token_id=1, **SIZES
    )
    return transformer(folder, transformers.XLMRobertaModel(config), words)


def qwen(folder: Path) -> Transformer:
    words = tokenizer(QWEN, "$A <eos>", padding_side="left")
    words.model_input_names = ["input_ids", "attention_mask"]
    config = transformers.Qwen3Config(
        vocab_size=len(words), max_position_embeddings=64, num_key_value_heads=2, head_dim=8, **SIZES
    )
    return transformer(folder, transformers.Qwen3Model(config), words)


def gemma(folder: Path) -> Transformer:
    """Like EmbeddingGemma: tokens attend to both sides, in some layers only to near ones."""
    words = tokenizer(GEMMA, "<bos> $A <eos>")
    words.model_input_names = ["input_ids", "attention_mask"]
    config = transformers.Gemma3TextConfig(
        vocab_size=len(words),
        max_position_embeddings=64,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
        **SIZES,
    )
    return transformer(folder, transformers.Gemma3TextModel(config), words)


def modernbert(folder: Path) -> Transformer:
    words = tokenizer(BERT, "[CLS] $A [SEP]")
    words.model_input_names = ["input_ids", "attention_mask"]
    special = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = transformers.ModernBertConfig(
        vocab_size=len(words), max_position_embeddings=64, local_attention=8, **special, **SIZES
    )
    return transformer(folder, transformers.ModernBertModel(config), words)


def nomic(folder: Path) -> Transformer:
    words = tokenizer(BERT, "[CLS] $A [SEP]")
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = transformers.NomicBertConfig(vocab_size=len(words), max_position_embeddings=64, **SIZES)
    return transformer(folder, transformers.NomicBertModel(config), words)


def fnet(folder: Path) -> Transformer:
    """Its layers read no attention mask, so that its vectors change with padding."""
    words = tokenizer(BERT, "[CLS] $A [SEP]")
    words.model_input_names = ["input_ids", "token_type_ids"]
    config = transformers.FNetConfig(
        vocab_size=len(words), max_position_embeddings=64, tpu_short_seq_length=64, **SIZES
    )
    return transformer(folder, transformers.FNetModel(config), words)


def clip(folder: Path) -> Transformer:
    """Its tokenizer allows more tokens than it has positions."""
    words = tokenizer(CLIP, "<s> $A </s>")
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": len(words), "max_position_embeddings": 16, **special, **SIZES},
        vision_config={"image_size": 8, "patch_size": 4, **SIZES},
        projection_dim=24,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return Transformer(str(folder))


def static() -> StaticEmbedding:
    return StaticEmbedding(tokenizer(BERT, "[CLS] $A [SEP]"), embedding_dim=32)


PROMPTS = {"query": "query: ", "passage": "the passage : ", "long": "the quick brown fox of the river : "}

Build = Callable[[Path], SentenceTransformer]
KINDS: dict[str, Build] = {
    "bert": lambda path: SentenceTransformer(modules=[bert(path), Pooling(32), Normalize()]),
    "mpnet": lambda path: SentenceTransformer(modules=[mpnet(path), Pooling(32)]),
    "roberta-cls": lambda path: SentenceTransformer(modules=[roberta(path), Pooling(32, "cls"), Normalize()]),
    "dense": lambda path: SentenceTransformer(modules=[bert(path), Pooling(32), Dense(32, 16), Normalize()]),
    "max-and-weighted": lambda path: SentenceTransformer(
        modules=[bert(path), Pooling(32, ("max", "weightedmean", "mean_sqrt_len_tokens"))]
    ),
    "prompts": lambda path: SentenceTransformer(
        modules=[mpnet(path), Pooling(32)], prompts=PROMPTS, default_prompt_name="passage"
    ),
    "prompt-not-pooled": lambda path: SentenceTransformer(
        modules=[bert(path), Pooling(32, include_prompt=False), Normalize()], prompts=PROMPTS
    ),
    "left-padding": lambda path: SentenceTransformer(
        modules=[qwen(path), Pooling(32, "lasttoken"), Normalize()], prompts=PROMPTS
    ),
    "left-padding-prompt-not-pooled": lambda path: SentenceTransformer(
        modules=[qwen(path), Pooling(32, "weightedmean", include_prompt=False)], prompts=PROMPTS
    ),
    "gemma": lambda path: SentenceTransformer(
        modules=[
            gemma(path),
            Pooling(32),
            Dense(32, 48, bias=False, activation_function=torch.nn.Identity()),
            Dense(48, 32, bias=False, activation_function=torch.nn.Identity()),
            Normalize(),
        ],
        prompts=PROMPTS,
    ),
    "modernbert": lambda path: SentenceTransformer(modules=[modernbert(path), Pooling(32, "cls")]),
    "nomic": lambda path: SentenceTransformer(
        modules=[nomic(path), Pooling(32), Normalize()], prompts=PROMPTS
    ),
    "no-mask": lambda path: SentenceTransformer(modules=[fnet(path), Pooling(32)]),
    "texts-and-images": lambda path: SentenceTransformer(modules=[clip(path)]),
    "static": lambda _path: SentenceTransformer(modules=[static(), Normalize()], prompts=PROMPTS),
    "routed": lambda path: SentenceTransformer(
        modules=[
            Router.for_query_document(
                query_modules=[static()], document_modules=[bert(path), Pooling(32)], allow_empty_key=True
            ),
            Normalize(),
        ],
        prompts=PROMPTS,
    ),
}


def build(kind: str, folder: Path) -> Path:
    """Make a model of this kind; returns the folder in which it is saved."""
    torch.manual_seed(sum(map(ord, kind)))
    saved = folder / "model"
    KINDS[kind](folder / "transformer").save(str(saved))
    return saved
