"""A causal language model of 2 layers with random weights, in memory or as a folder with a tokenizer of whole words.

transformers takes seconds to import, so that the functions that need it import it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fpxbench.model.generate_messages import SHIPPED_TEXT

WORDS = 120
HIDDEN = 64


def tiny_llama(**changes) -> Any:
    """Return the model in bf16, in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Weights large enough that logits differ from token to token, as a trained model's do.
    config = LlamaConfig(**dict(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS + 2, max_position_embeddings=256, initializer_range=0.25, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, tie_word_embeddings=False) | changes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", SHIPPED_TEXT.read_text(encoding="utf-8")))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *list(words)[:WORDS]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def save_tiny(folder: Path, **changes) -> Path:
    """Write the model to `folder` and return it."""
    tiny_llama(**changes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
