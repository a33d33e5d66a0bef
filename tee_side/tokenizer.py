"""Text to token ids and back, by the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from asynctsqp.errors import BadInputError, CheckpointError, PromptError, one_line
from tee_side.llama_config import LlamaConfig
from tee_side.token_bytes import TokenBytes

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

CONTEXT_TOKENS = 6  # of already shown text that a new piece is decoded with: spacing depends on neighbours


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Raises CheckpointError if there is none, or it cannot be read."""
        transformers.logging.set_verbosity_error()
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory,
                config=LlamaConfig.from_pretrained(directory),
                trust_remote_code=False,  # it would ask whoever is at standard input whether to run it
            )
        except Exception as error:  # whatever its many formats raise
            raise CheckpointError(f"{directory} has no tokenizer that can be read: {one_line(error)}") from None
        self._vocab_size = vocab_size
        self.bytes_of = TokenBytes(self._tokenizer).of

    def encode(self, prompt: Prompt) -> list[int]:
        """Text gets the tokenizer's special tokens, chat messages the chat template, token ids nothing.

        Raises PromptError if nothing is left of it, or a token is not of this model.
        """
        try:
            tokens = self._encode(prompt)
        except UnicodeEncodeError:  # half of a surrogate pair, as bytes that are no UTF-8 become in an argument
            raise PromptError("the prompt is not text: it holds bytes that are no UTF-8") from None
        if not tokens:
            raise PromptError("the prompt is empty")
        if not all(0 <= token < self._vocab_size for token in tokens):
            raise PromptError(f"the prompt holds something that is not a token id from 0 to {self._vocab_size - 1}")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty")
            prompt.encode()
            return list(self._tokenizer.encode(prompt))
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise PromptError("a prompt is text, token ids, or chat messages")
        messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
        if messages and len(messages) == len(prompt):
            return self._encode_chat(messages)
        tokens = [int(token) for token in prompt if isinstance(token, Integral) and not isinstance(token, bool)]
        if len(tokens) != len(prompt):
            raise PromptError("a prompt is text, token ids, or chat messages, and not a mixture")
        return tokens

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise BadInputError("this model has no chat template: give it a raw prompt")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # jinja's, raised by the template itself
            raise PromptError(f"the chat template refuses these messages: {one_line(error)}") from None
        str(text).encode()
        return list(self._tokenizer.encode(str(text), add_special_tokens=False))


class TextStream:
    """Turns tokens into text as they come. Holds back what may still change: a character whose bytes are not
    all there, and text that may turn out to be the start of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._shown = len(self._tokens)  # tokens whose text is out of the tokenizer
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain; may be empty. Sets `stopped` at a stop string, which is cut off."""
        self._tokens.append(token)
        return self._release(self._decode(final=False), final=False)

    def finish(self) -> str:
        """All that was held back."""
        return "" if self.stopped else self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[: self._shown])
        text = self._tokenizer.decode(self._tokens)
        if not final and text.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[-CONTEXT_TOKENS:] if len(text) > len(before) else self._tokens
        self._shown = len(self._tokens)
        return text[len(before) :]

    def _release(self, text: str, final: bool) -> str:
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            certain, self._held = self._held[: min(starts)], ""
            return certain
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
