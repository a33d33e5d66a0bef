"""A multi-turn chat in a terminal."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from asynctsqp.conversation import Conversation
from asynctsqp.engine import Engine, Piece
from asynctsqp.errors import PromptError
from asynctsqp.reports.stats_table import rendered
from asynctsqp.terminal import Terminal, until_interrupted
from tee_side.request import Progress

HELP = """\
/reset        forget what was said
/system TEXT  what the model is told before all else; without TEXT: nothing
/exit         end, as Ctrl-D does
Ctrl-C        stop an answer, and keep what it said; take back a line; at an empty prompt: end"""
COMMAND = re.compile(r"/[a-z]*")


async def chat(engine: Engine, sampling: dict[str, Any]) -> None:
    """Until the end of the input or /exit. Raises KeyboardInterrupt for a Ctrl-C at an empty prompt."""
    terminal = Terminal()
    talk = Chat(engine, sampling, terminal)
    terminal.note("Chat with the model: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    while (line := terminal.ask()) is not None:
        word, _, rest = line.strip().partition(" ")
        if word == "/exit":
            return
        if COMMAND.fullmatch(word):
            talk.command(word, rest.strip())
        elif word:
            await talk.turn(line)


class Chat:
    """A conversation with a model. The whole of it is the prompt of each turn."""

    def __init__(self, engine: Engine, sampling: dict[str, Any], terminal: Terminal) -> None:
        self._engine = engine
        self._sampling = sampling
        self._terminal = terminal
        self._conversation = Conversation()

    def command(self, name: str, text: str) -> None:
        match name:
            case "/help":
                self._terminal.note(HELP)
            case "/reset":
                self._conversation.reset()
                self._terminal.note("forgotten")
            case "/system":
                self._conversation.system = text
                self._terminal.note("the model is told that" if text else "the model is told nothing")
            case _:
                self._terminal.note(f"there is no command {name}: /help lists them")

    async def turn(self, question: str) -> None:
        """Asks, shows the answer as it comes, and keeps both: also of an answer that is stopped."""
        said: list[Piece] = []
        progress = Progress()
        try:
            stopped = await until_interrupted(self._answer(question, said, progress))
        except PromptError as error:
            self._terminal.note(f"not asked: {error}")
            return
        finally:
            if said:
                self._terminal.end_line()
        if said:
            self._conversation.add(question, "".join(piece.text for piece in said))
            if said[-1].finish_reason == "length":
                self._terminal.note(f"cut off after {len(said)} tokens: --max-new-tokens")
        if stopped:
            self._terminal.note("stopped" if said else "stopped before it began: the question is taken back")
        if progress.stats is not None:
            self._terminal.note(rendered(progress.stats))

    async def _answer(self, question: str, said: list[Piece], progress: Progress) -> None:
        most = self._sampling["max_new_tokens"]
        prompt, dropped = await self._conversation.prompt(self._engine, question, most)
        if dropped:
            self._terminal.note(f"the context is full: the oldest {dropped} of the turns are forgotten")
        async with contextlib.aclosing(self._engine.generate(prompt, progress=progress, **self._sampling)) as pieces:
            async for piece in pieces:
                said.append(piece)
                self._terminal.write(piece.text)
