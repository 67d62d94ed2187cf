"""A causal language model of 2 layers with random weights and a tokenizer of whole words, as a folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fpxbench.model.generate_messages import SHIPPED_TEXT

WORDS = 120


def tiny_config(**changes) -> LlamaConfig:
    # Weights large enough that logits differ from token to token, as a trained model's do.
    return LlamaConfig(**dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS + 2, max_position_embeddings=256, initializer_range=0.25, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, tie_word_embeddings=False) | changes)


def save_tokenizer(folder: Path) -> None:
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", SHIPPED_TEXT.read_text(encoding="utf-8")))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *list(words)[:WORDS]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def save_tiny(folder: Path, **changes) -> Path:
    """Write the model to `folder` and return it."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(**changes)).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
