"""The chat, on a pseudo-terminal with the real command: turns, Ctrl-C at any moment, what stays and what does not."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from asynctsqp import Engine
from asynctsqp.conversation import Conversation
from asynctsqp.errors import PromptError
from asynctsqp.terminal import Terminal
from tests.conftest import GpuProcess
from tests.processes import wait_until
from tests.terminals import CTRL_C, CTRL_D, PROMPT, UP, terminal
from tests.test_signals import idle

GREEDY = ("--temperature", "0", "--ignore-eos")
STORY = b"Write a long story about a fox."
Models = Callable[[str], Path]


def said(shown: bytes, question: bytes) -> str:
    """The answer, out of what was shown between the question and the next prompt."""
    text = re.fullmatch(re.escape(question) + rb"\r\n(.*?)(\^C)?\r\n(stopped\r\n)?> ", shown, re.DOTALL)
    assert text, shown
    return text[1].replace(b"\r\n", b"\n").decode()


def test_turns_of_which_one_is_stopped(demo_model: Path) -> None:
    """The engine says the same to the same messages: the whole conversation is the prompt, with all that was said."""
    shown: list[tuple[bytes, bytes]] = []
    questions = (b"What is the capital of France?", b"And of Germany?")
    with terminal("--model", str(demo_model), "--temperature", "0", "--max-new-tokens", "160") as chat:
        chat.read_until(PROMPT)
        shown += [(question, chat.ask(question)) for question in questions]
        chat.type(STORY + b"\n")
        begun = chat.read_until(b"\n") + chat.read_until(b"fox ")
        chat.type(CTRL_C)
        shown += [(STORY, begun + chat.read_until(b"\n" + PROMPT))]
        shown += [(questions[0], chat.ask(questions[0]))]
        chat.type(CTRL_D)
        assert chat.end() == (0, b"\r\n")
    assert b"^C\r\nstopped\r\n" in shown[2][1]

    async def replay() -> None:
        messages: list[dict[str, str]] = []
        async with Engine.launch(demo_model) as engine:
            for question, answer in shown:
                messages.append({"role": "user", "content": question.decode()})
                text = said(answer, question)
                done = await engine.complete(messages, temperature=0, max_new_tokens=160)
                assert text
                assert done.text.startswith(text) if question == STORY else done.text == text
                messages.append({"role": "assistant", "content": text})

    asyncio.run(replay())


def test_a_stopped_answer_is_worked_on_no_more(tiny_model: Models) -> None:
    """By the operating system's account: both processes compute, and after Ctrl-C they do not."""
    flags = ("--model", str(tiny_model("16-layers")), *GREEDY, "--max-new-tokens", "4000")
    with terminal(*flags) as chat:
        chat.read_until(PROMPT)
        chat.type(b"Hello\n")
        chat.read_until(b"Hello\r\n")
        processes = [process.pid for process in chat.processes()]
        assert len(processes) == 2
        assert not any(idle(pid) for pid in processes)
        chat.type(CTRL_C)
        chat.read_until(b"stopped\r\n" + PROMPT)
        assert wait_until(lambda: all(idle(pid) for pid in processes), 10)
        chat.type(b"/exit\n")
        assert chat.end()[0] == 0


def test_lines_are_edited_remembered_and_taken_back_and_never_on_disk(tiny_model: Models, tmp_path: Path) -> None:
    flags = ("--model", str(tiny_model("gqa")), "--max-new-tokens", "1", *GREEDY)
    with terminal(*flags, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1") as chat:
        chat.read_until(PROMPT)
        chat.ask(b"hello")
        chat.type(b"a line that")
        chat.read_until(b"a line that")
        chat.type(CTRL_C)
        chat.read_until(b"\n" + PROMPT)
        chat.type(UP)
        chat.read_until(b"hello")
        assert b"\ncut off after 1 tokens: --max-new-tokens\r\n" in chat.ask(b" again")
        assert b"/reset" in chat.ask(b"/help")
        assert b"no command /help-me" not in chat.ask(b"/etc/passwd, what is it?")
        assert b"there is no command /halp: /help lists them" in chat.ask(b"/halp")
        assert b"forgotten" in chat.ask(b"/reset")
        assert b"is told that" in chat.ask(b"/system You are a cat.")
        assert b"is told nothing" in chat.ask(b"/system")
        assert chat.ask(b"  ") == b"  \r\n> "
        chat.type(CTRL_C)
        assert chat.end() == (130, b"\r\nasynctsqp.tee: interrupted\r\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("keys", [b"half a line", b"Hello\n"], ids=["typing", "answering"])
def test_a_chat_that_is_terminated(keys: bytes, tiny_model: Models) -> None:
    flags = ("--model", str(tiny_model("16-layers")), "--max-new-tokens", "4000", *GREEDY)
    with terminal(*flags) as chat:
        chat.read_until(PROMPT)
        chat.type(keys)
        chat.read_until(keys.strip())
        if keys.endswith(b"\n"):
            chat.read_until(b"\n")
            assert not idle(chat.process.pid)
        chat.process.send_signal(signal.SIGTERM)
        code, rest = chat.end()
    assert code == 130
    assert rest.endswith(b"\nasynctsqp.tee: interrupted\r\n")
    assert b"Traceback" not in rest


def test_a_lost_gpu_side_ends_the_chat_with_one_line(
    tiny_model: Models, start_gpu: Callable[..., GpuProcess], tmp_path: Path
) -> None:
    """Also: what is no answer goes to standard error, so that standard output can be kept."""
    gpu, output = start_gpu(tiny_model("gqa")), tmp_path / "answers"
    flags = ("--model", str(tiny_model("gqa")), "--gpu", gpu.endpoint, "--max-new-tokens", "4", *GREEDY)
    with terminal(*flags, output=output) as chat:
        chat.read_until(PROMPT)
        chat.ask(b"Hello")
        answered = output.read_bytes()
        gpu.kill()
        chat.type(b"Are you there?\n")
        code, rest = chat.end()
    assert code == 3
    lines = rest.decode().splitlines()
    assert lines[0] == "Are you there?"
    assert [line.startswith("asynctsqp.tee: error: ") for line in lines[1:]] == [True]
    assert output.read_bytes() == answered
    assert answered.endswith(b"\n")
    assert b"> " not in answered


def test_a_full_context_forgets_the_oldest_and_says_so(tiny_model: Models) -> None:
    """512 tokens, of which 250 are for the answer."""
    long = b"word " * 600
    with terminal("--model", str(tiny_model("gqa")), "--max-new-tokens", "250", *GREEDY) as chat:
        chat.read_until(PROMPT)
        assert b"context" not in chat.ask(b"One")
        assert b"\r\nthe context is full: the oldest 1 of the turns are forgotten\r\n" in chat.ask(b"Two")
        assert b"\r\nnot asked: the prompt has 6" in chat.ask(long)
        assert b"not asked" not in chat.ask(b"Four")
        chat.type(CTRL_D)
        assert chat.end()[0] == 0


def test_a_conversation_drops_turns_until_there_is_room(connect: Callable[..., Engine]) -> None:
    turns = [(f"Question {turn}? " * 6, f"Answer {turn}. " * 6) for turn in range(8)]

    def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        spoken = [("system", "Be brief.")]
        for asked, answered in turns:
            spoken += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": content} for role, content in [*spoken, ("user", "And?")]]

    async def run() -> None:
        async with connect() as engine:
            for room, reserved in ((16, 16), (200, 200), (400, 256), (100_000, 256)):
                talk = Conversation()
                talk.system = "Be brief."
                for turn in turns:
                    talk.add(*turn)
                tokens, dropped = await talk.prompt(engine, "And?", room)
                assert tokens == await engine.tokenize(messages(turns[dropped:]))
                assert len(tokens) <= engine.context_tokens - reserved
                assert dropped
                assert len(await engine.tokenize(messages(turns[dropped - 1 :]))) > engine.context_tokens - reserved
                assert (await talk.prompt(engine, "And?", room))[1] == 0, "they are dropped for good"
            talk.reset()
            assert (await talk.prompt(engine, "And?", 16))[0] == await engine.tokenize(messages([]))

    asyncio.run(run())


def test_an_answer_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Terminal()
    screen.write("a\x1b]52;c;c2VjcmV0\x07b\x9b2Jc\rd\x08e\tf\ng \u200d東\u00a0")
    assert capsys.readouterr().out == "a\ufffd]52;c;c2VjcmV0\ufffdb\ufffd2Jc\ufffdd\ufffde\tf\ng \u200d東\u00a0"


def test_a_question_that_is_no_text_is_not_asked(connect: Callable[..., Engine]) -> None:
    """Bytes that are no UTF-8, as a terminal in another encoding sends them."""

    async def run() -> None:
        async with connect() as engine:
            with pytest.raises(PromptError):
                await Conversation().prompt(engine, os.fsdecode(b"caf\xe9"), 16)

    asyncio.run(run())
