"""The TEE side's view of a config.json, by transformers' own class: what it reads, and what that does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import transformers

from tee_side.llama_config import LlamaConfig

SIZES = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FILES: dict[str, dict[str, Any]] = {
    "nothing beyond sizes": {},
    "a context": {"max_position_embeddings": 131072, "head_dim": 32},
    "one end": {"eos_token_id": 7, "bos_token_id": None},
    "several ends": {"eos_token_id": [7, 8, 9]},
    "no end": {"eos_token_id": None},
    "theta alone": {"rope_theta": 500000.0},
    "as before transformers 5": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "an older name of the type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "as it is saved now": {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    "a tokenizer's class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "fields of training": {
        "initializer_range": 0.1,
        "use_cache": False,
        "pretraining_tp": 2,
        "torch_dtype": "bfloat16",
    },
}
FIELDS = ("model_type", "hidden_size", "num_attention_heads", "max_position_embeddings", "eos_token_id")
FIELDS += ("rope_parameters", "_name_or_path")
# what transformers' LlamaConfig brings in; torch.distributed itself comes with torch
UNNEEDED = ("sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers.modeling_utils")


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SIZES | FILES[name]))
    ours, theirs = LlamaConfig.from_pretrained(tmp_path), transformers.LlamaConfig.from_pretrained(tmp_path)
    for field in FIELDS:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert (ours.head_dim or ours.hidden_size // ours.num_attention_heads) == theirs.head_dim
    assert getattr(ours, "tokenizer_class", None) == getattr(theirs, "tokenizer_class", None)


@pytest.mark.parametrize("wrong", [{"eos_token_id": "</s>"}, {"max_position_embeddings": 0.5}, {"rope_parameters": 1}])
def test_a_field_of_another_type_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(SIZES | wrong))
    for config in (transformers.LlamaConfig, LlamaConfig):
        with pytest.raises(Exception, match=next(iter(wrong))):
            config.from_pretrained(tmp_path)


def loaded(script: str) -> list[str]:
    """Those of UNNEEDED that a process has imported at the end of the script."""
    script += f"\nimport sys\nprint(*(name for name in {UNNEEDED!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def test_the_tee_side_does_not_import_what_it_does_not_use(demo_model: Path) -> None:
    """An enclave would have to trust and hold it."""
    if loaded("from transformers import AutoTokenizer"):
        pytest.skip(f"transformers {transformers.__version__} imports them with its tokenizers")
    tokenizer = f"Tokenizer(Path({str(demo_model)!r}), 1 << 20)"
    imports = "import asynctsqp.command\nfrom pathlib import Path\nfrom tee_side.tokenizer import Tokenizer\n"
    assert loaded(imports + tokenizer) == []
