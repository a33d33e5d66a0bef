"""The shapes of a LLaMA checkpoint and of every linear that may be offloaded.

Both sides derive every size from here (that is, from the checkpoint's own config.json), never from a
message of the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import msgspec

from asynctsqp.errors import CheckpointError

MAX_LAYERS = 4096  # far above any model: a damaged config must not keep us busy
MAX_SIZE = 1 << 26


class Op(IntEnum):
    """What the GPU side can be asked for. layouts.py says which tensors each takes and gives."""

    # linears, fused where they share their input
    QKV = 0
    O = 1  # noqa: E741 - the field's name for it
    GATE_UP = 2
    DOWN = 3
    LM_HEAD = 4
    # their parts
    Q = 5
    K = 6
    V = 7
    GATE = 8
    UP = 9
    # the other products of a LLaMA
    EMBEDDING = 10
    QK = 11  # q k^T, before the softmax
    AV = 12  # softmax(scores) v
    # compositions
    NORM_QKV = 13  # RMSNorm, q|k|v
    O_MLP = 14  # o, residual, RMSNorm, MLP, residual
    LAYER = 15  # O_MLP, then NORM_QKV of the next layer


PARTS = {Op.QKV: (Op.Q, Op.K, Op.V), Op.GATE_UP: (Op.GATE, Op.UP)}  # in the order of their rows


@dataclass(frozen=True)
class LinearSpec:
    """One product `y[rows, out_features] = x[rows, in_features] W^T (+ bias)`.

    `parts` names the checkpoint modules whose rows are stacked into W, in order, with their row counts;
    `{layer}` in a name stands for the layer's index.
    """

    in_features: int
    parts: tuple[tuple[str, int], ...]
    bias: bool

    @cached_property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)


class _ConfigFile(msgspec.Struct):
    """The fields of config.json that decide shapes and arithmetic (Hugging Face's LlamaConfig)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    model_type: str
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a LLaMA that is not a weight and not the rotary embedding."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tied_embedding: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, config_file: Path) -> ModelSpec:
        """Raises CheckpointError where the file is missing or is not a LLaMA's."""
        try:
            config = msgspec.json.decode(config_file.read_bytes(), type=_ConfigFile)
        except FileNotFoundError:
            raise CheckpointError(f"{config_file.parent} holds no config.json: not a model directory") from None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{config_file} is not a LLaMA config: {error}") from None
        return cls._from_config(config, config_file)

    @classmethod
    def _from_config(cls, config: _ConfigFile, config_file: Path) -> ModelSpec:
        if config.model_type != "llama":
            raise CheckpointError(
                f"{config_file} is of model type {config.model_type!r}: only LLaMA checkpoints are supported"
            )
        if config.hidden_act != "silu":
            raise CheckpointError(f"{config_file} uses {config.hidden_act!r}: only the SiLU activation is supported")
        spec = cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // max(config.num_attention_heads, 1),
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tied_embedding=config.tie_word_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )
        sizes = [spec.hidden_size, spec.intermediate_size, spec.layers, spec.heads, spec.kv_heads, spec.head_dim]
        sizes += [spec.vocab_size, spec.max_positions]
        if min(sizes) < 1 or max(sizes) > MAX_SIZE or spec.layers > MAX_LAYERS or spec.heads % spec.kv_heads:
            raise CheckpointError(f"{config_file} holds impossible sizes")
        return spec

    @cached_property
    def q_features(self) -> int:
        return self.heads * self.head_dim

    @cached_property
    def kv_features(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[Op, LinearSpec]:
        attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
        qkv = (
            (attention + "q_proj", self.q_features),
            (attention + "k_proj", self.kv_features),
            (attention + "v_proj", self.kv_features),
        )
        gate_up = ((mlp + "gate_proj", self.intermediate_size), (mlp + "up_proj", self.intermediate_size))
        lm_head = "model.embed_tokens" if self.tied_embedding else "lm_head"
        return {
            Op.QKV: LinearSpec(self.hidden_size, qkv, self.attention_bias),
            Op.O: LinearSpec(self.q_features, ((attention + "o_proj", self.hidden_size),), self.attention_bias),
            Op.GATE_UP: LinearSpec(self.hidden_size, gate_up, self.mlp_bias),
            Op.DOWN: LinearSpec(self.intermediate_size, ((mlp + "down_proj", self.hidden_size),), self.mlp_bias),
            Op.LM_HEAD: LinearSpec(self.hidden_size, ((lm_head, self.vocab_size),), bias=False),
        }

    def layers_of(self, op: Op) -> int:
        """How many layers have this operation: 1 for those that stand before or behind them all."""
        if op is Op.LAYER:
            return self.layers - 1  # the last has no next one
        return 1 if op in (Op.EMBEDDING, Op.LM_HEAD) else self.layers

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint of this model must hold."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        for layer in range(self.layers):
            shapes[f"model.layers.{layer}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (self.hidden_size,)
        for op, linear in self.linears.items():
            for layer in range(self.layers_of(op)):
                for part, rows in linear.parts:
                    name = part.format(layer=layer)
                    shapes[name + ".weight"] = (rows, linear.in_features)
                    if linear.bias:
                        shapes[name + ".bias"] = (rows,)
        return shapes
