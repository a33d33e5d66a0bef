"""What may be asked for, as OpenAI's API names it, and as jobs for the engine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from asynctsqp.config import SamplingOptions, make
from asynctsqp.engine import Prompt
from asynctsqp.errors import BadInputError
from asynctsqp.service.api_errors import ApiError, invalid, unsupported
from asynctsqp.service.jobs import Job

MOST_STOPS = 16
MOST_TOP = 20  # alternatives to a token
_FLAG = re.compile(r"--([a-z-]+)")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Asked(msgspec.Struct, kw_only=True):
    """What both endpoints have. top_k and ignore_eos are extensions."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most(self) -> int | None:
        """New tokens; None: it does not say."""
        return self.max_tokens

    def sampling(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """SamplingOptions. Raises ApiError for values that make no sense."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed", "ignore_eos")}
        asked["max_new_tokens"] = self.most
        if self.stop is not None:
            asked["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        chosen = defaults | {name: value for name, value in asked.items() if value is not None}
        if len(chosen["stop"]) > MOST_STOPS:
            raise invalid(f"stop takes {MOST_STOPS} texts at most", "stop")
        try:
            make(SamplingOptions, chosen)
        except BadInputError as error:
            raise _as_parameter(error) from None
        return chosen

    def numbered(self, prompts: Sequence[Prompt], sampling: dict[str, Any], most: int, **details: Any) -> list[Job]:
        """`n` jobs for each prompt; with a seed, each of these has one of its own. Raises ApiError for over `most`."""
        n = 1 if self.n is None else self.n
        if n < 1:
            raise invalid("n is at least 1", "n")
        if len(prompts) * n > most:  # before they are made: n is any number
            raise ApiError(400, "too_many_answers", f"one request may ask for {most} answers at most")
        seed = sampling["seed"]
        return [
            Job(prompt=prompt, sampling=sampling | {"seed": None if seed is None else seed + copy}, **details)
            for prompt in prompts
            for copy in range(n)
        ]


class Part(msgspec.Struct):
    """Of a message whose content is a list."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[Any] | None = None

    def plain(self) -> dict[str, str]:
        """As the chat template takes it. Raises ApiError for what is not text."""
        if self.role in ("tool", "function") or self.tool_calls:
            raise unsupported("messages", "messages of tools are not supported by this service")
        if self.role not in ("system", "developer", "user", "assistant"):
            raise invalid("the role of a message is system, developer, user or assistant", "messages")
        if self.content is None:
            raise invalid("a message has no content", "messages")
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        if any(part.type != "text" or part.text is None for part in self.content):
            raise unsupported("messages", "only text is supported in messages")
        return {"role": role, "content": "".join(part.text or "" for part in self.content)}


class ChatAsked(Asked, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def jobs(self, defaults: dict[str, Any], most: int) -> list[Job]:
        if not self.messages:
            raise invalid("there are no messages", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs", "top_logprobs")
        top = _top(self.top_logprobs or 0, "top_logprobs") if self.logprobs else None
        messages = [message.plain() for message in self.messages]
        return self.numbered([messages], self.sampling(defaults), most, logprobs=top)


class TextAsked(Asked, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None

    def jobs(self, defaults: dict[str, Any], most: int) -> list[Job]:
        top = None if self.logprobs is None else _top(self.logprobs, "logprobs")
        only_echo = bool(self.echo) and self.max_tokens == 0
        asked = msgspec.structs.replace(self, max_tokens=None) if only_echo else self
        sampling = asked.sampling(defaults)
        return self.numbered(self._prompts(), sampling, most, logprobs=top, echo=bool(self.echo), only_echo=only_echo)

    def _prompts(self) -> list[Prompt]:
        """A text, texts, token ids, or lists of token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or _token_ids(prompt):
            return [prompt]
        kinds = {type(one) for one in prompt}
        if kinds == {str} or (kinds == {list} and all(map(_token_ids, prompt))):
            return list(prompt)
        raise invalid("prompt is a text, a list of texts, of token ids, or of lists of token ids", "prompt")


def _token_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and all(type(token) is int for token in prompt)


def _top(count: int, param: str) -> int:
    if not 0 <= count <= MOST_TOP:
        raise invalid(f"{param} is from 0 to {MOST_TOP}", param)
    return count


def _as_parameter(error: BadInputError) -> ApiError:
    """The engine's options have the names of flags in their errors."""
    found = _FLAG.search(str(error))
    param = found[1].replace("-", "_") if found else None
    param = "max_tokens" if param == "max_new_tokens" else param
    return invalid(_FLAG.sub(str(param), str(error)), param)
