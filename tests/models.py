"""Tiny random LLaMAs, saved by transformers as a user's checkpoint would be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 49152,  # the demo model's tokenizer is used for all
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim": {"head_dim": 32, "num_key_value_heads": 1},
    "llama3-rope": {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "dynamic-rope": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 256,
    },
}


# For counting calls: the depths of the models that the first counts were made with.
TINY_DEPTHS = {
    f"{layers}-layers": {"num_hidden_layers": layers, "max_position_embeddings": 4096} for layers in (1, 16, 22)
}


def save_tiny(directory: Path, name: str, tokenizer_from: Path, shard_size: str = "5GB") -> Path:
    """A model of TINY or TINY_DEPTHS with weights large enough that its tokens vary; deterministic."""
    torch.manual_seed(sum(name.encode()))
    model = LlamaForCausalLM(LlamaConfig(**(BASE | (TINY | TINY_DEPTHS)[name])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=shard_size)
    copy_tokenizer(tokenizer_from, directory)
    return directory


def copy_tokenizer(source: Path, directory: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / file, directory / file)
