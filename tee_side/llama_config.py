"""What RoPE, the tokenizer and the end of an answer need of a LLaMA's config.json, as transformers reads it.

transformers' own LlamaConfig checks one of its fields by way of a module that imports torch.distributed and sympy:
700 modules and 30 MiB that an enclave would have to trust and hold, and a second of each start. Shapes are not of
here: asynctsqp.model_spec reads them, and both sides do so.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict  # by the annotations themselves: no `from __future__ import annotations` here
class LlamaConfig(PreTrainedConfig):
    """`LlamaConfig.from_pretrained(directory)`. Fields and defaults are those of the class of this name there."""

    model_type = "llama"

    hidden_size: int = 4096
    num_attention_heads: int = 32
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = 2
    rope_parameters: dict[str, Any] | None = None
