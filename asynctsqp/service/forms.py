"""What is answered: the objects of OpenAI's two endpoints, whole and in parts."""

from __future__ import annotations

from typing import Any, Protocol

from asynctsqp.engine import TokenScore
from asynctsqp.service import logprobs
from asynctsqp.service.jobs import Job, Part


class Form(Protocol):
    """One endpoint's."""

    prefix: str  # of an answer's id
    whole: str  # its object, all at once
    part: str  # and as an event of a stream

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first choice of a stream, before there is any text."""

    def event(self, index: int, part: Part, offset: int) -> dict[str, Any]:
        """A choice of a stream. offset: characters of the tokens before."""

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        """A whole choice."""


class ChatForm:
    """POST /v1/chat/completions"""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    part = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def event(self, index: int, part: Part, offset: int) -> dict[str, Any]:
        delta = {"content": part.text} if part.text else {}
        return {"index": index, "delta": delta, **_chat_rest(part)}

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": index, "message": message, **_chat_rest(part)}


class TextForm:
    """POST /v1/completions"""

    prefix = "cmpl-"
    whole = part = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def event(self, index: int, part: Part, offset: int) -> dict[str, Any]:
        scores = None if part.scores is None else logprobs.for_text(part.scores, offset)
        return {"index": index, "text": part.text, "logprobs": scores, "finish_reason": part.finish_reason}

    def choice(self, index: int, part: Part) -> dict[str, Any]:
        return self.event(index, part, 0)


def _chat_rest(part: Part) -> dict[str, Any]:
    scores = None if part.scores is None else logprobs.for_chat(part.scores)
    return {"logprobs": scores, "finish_reason": part.finish_reason}


def joined(parts: list[Part]) -> Part:
    """All of one answer."""
    scores: list[TokenScore] = [score for part in parts for score in part.scores or ()]
    wanted = any(part.scores is not None for part in parts)
    return Part("".join(part.text for part in parts), scores if wanted else None, parts[-1].finish_reason)


def usage(jobs: list[Job], copies: int) -> dict[str, int]:
    """Of all answers. A prompt counts once, however many answers it has."""
    prompt = sum(job.usage[0] for job in jobs[::copies])
    completion = sum(job.usage[1] for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
