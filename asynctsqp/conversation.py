"""What was said in a chat so far, and as much of it as the model's context holds."""

from __future__ import annotations

from asynctsqp.engine import Engine

Messages = list[dict[str, str]]


class Conversation:
    """Questions and answers in turn, behind a system message if there is one. Kept in memory and nowhere else."""

    def __init__(self) -> None:
        self.system = ""
        self._turns: list[tuple[str, str]] = []

    def add(self, question: str, answer: str) -> None:
        self._turns.append((question, answer))

    def reset(self) -> None:
        """Forgets all but the system message."""
        self._turns.clear()

    async def prompt(self, engine: Engine, question: str, answer_tokens: int) -> tuple[list[int], int]:
        """The token ids of it all with a new question, and how many of the oldest turns were dropped for good.

        They are dropped until there is room for so many tokens of an answer, but never for more than half the context.
        """
        most = engine.context_tokens - min(answer_tokens, engine.context_tokens // 2)
        dropped = 0
        while len(tokens := await engine.tokenize(self._messages(question))) > most and self._turns:
            del self._turns[0]
            dropped += 1
        return tokens, dropped

    def _messages(self, question: str) -> Messages:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self._turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": question}]
