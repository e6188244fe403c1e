"""Small models of other makers, as transformers saves them: weights are drawn, tokenizers learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def learned_tokenizer(sentences: list[str], extra: list[str]) -> Any:
    """Byte-level BPE with the usual special tokens first, and `<s>` before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences[:1_000], trainer)
    tokenizer.add_special_tokens(extra)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def save_tokenizer_for(
    directory: Path, sentences: list[str], extra: list[str], chat_template: str | None = None
) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned_tokenizer(sentences, extra),
        bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_llama(directory: Path, sentences: list[str], chat_template: str | None) -> Any:
    """A decoder, with or without a template for chats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    extra = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = save_tokenizer_for(directory, sentences, extra, chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def save_nllb(directory: Path, sentences: list[str]) -> Any:
    """An M2M100 with the tokenizer of NLLB and four of its languages."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=_SPECIAL, show_progress=False)
    learned.train_from_iterator(sentences[:1_000], trainer)
    import json

    said = json.loads(learned.to_str())["model"]
    tokenizer = NllbTokenizer(
        vocab=said["vocab"],
        merges=[tuple(pair) for pair in said["merges"]],
        extra_special_tokens=["deu_Latn", "eng_Latn", "zho_Hans", "zho_Hant"],
    )
    tokenizer.save_pretrained(directory)
    config = M2M100Config(
        vocab_size=len(tokenizer), d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(2)
    model = M2M100ForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    return model


def save_bert(directory: Path, sentences: list[str], kind: str, **config: Any) -> Any:
    """A classifier or a reader: `BertForSequenceClassification`, `BertForQuestionAnswering`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    learned = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learned.normalizer = normalizers.BertNormalizer()
    learned.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learned.train_from_iterator(
        sentences[:1_000], trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    learned.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=learned)
    tokenizer.save_pretrained(directory)
    values = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, initializer_range=0.5, **config,
    )  # fmt: skip
    torch.manual_seed(3)
    model = getattr(transformers, kind)(values).eval()
    model.save_pretrained(directory)
    return model
