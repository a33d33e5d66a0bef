"""What is long waits for what is short, and for its turn; a pass that is alone waits for nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from itertools import pairwise

import pytest

from tee_side.pace import PIECE_S, TURNS, Pace

PIECES = 6


def compute() -> None:
    """Meanwhile nobody else runs."""
    time.sleep(2 * PIECE_S)


async def long_pass(pace: Pace, name: str, log: list[str]) -> None:
    with pace.running():
        async with pace.long():
            for _ in range(PIECES):
                await pace.breathe()
                compute()
                log.append(name)


def run(*passes: Coroutine[None, None, None]) -> None:
    async def together() -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*passes)

    asyncio.run(together())


def test_long_ones_come_one_after_the_other() -> None:
    log: list[str] = []
    pace = Pace(lambda: False)
    run(*(long_pass(pace, name, log) for name in "abc"))
    assert log == [*"a" * PIECES, *"b" * PIECES, *"c" * PIECES]


def test_what_is_short_goes_between_the_pieces_of_what_is_long() -> None:
    """As a lane does whose answer is here: one turn for whoever reads it, one for the lane."""
    log: list[str] = []
    pace = Pace(lambda: False)

    async def short_pass() -> None:
        with pace.running():
            while log.count("long") < PIECES:
                answer = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(answer.set_result, None)
                await answer
                log.append("short")

    run(short_pass(), long_pass(pace, "long", log))
    assert ("long", "long") not in pairwise(log)


def test_an_answer_that_is_here_is_not_kept_waiting() -> None:
    """Where it is known that there is one, nobody waits for a piece's time to be over; where not, nobody is asked."""
    log: list[str] = []
    here = [False, True, False, False]

    def answered() -> bool:
        log.append("asked")
        return here[log.count("asked") - 1]

    async def other() -> None:
        with pace.running():
            while log.count("asked") < len(here):
                log.append("turn")
                await asyncio.sleep(0)

    async def pieces() -> None:
        with pace.running():
            async with pace.long():
                log.clear()
                for _ in here:
                    await pace.breathe()

    pace = Pace(answered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tee_side.pace.PIECE_S", 1000)
        run(other(), pieces())
    assert log == ["asked", "asked", *["turn"] * TURNS, "asked", "asked"]


def test_a_single_pass_gives_no_turn_away() -> None:
    log: list[str] = []

    async def bystander() -> None:
        while log.count("long") < PIECES:
            log.append("turn")
            await asyncio.sleep(0)

    run(long_pass(Pace(lambda: False), "long", log), bystander())
    assert log[:PIECES] == ["long"] * PIECES


def test_one_that_is_cancelled_or_fails_leaves_the_way_free() -> None:
    pace = Pace(lambda: False)

    async def work() -> None:
        async def forever() -> None:
            with pace.running():
                async with pace.long():
                    await asyncio.Event().wait()

        tasks = [asyncio.create_task(forever()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(ZeroDivisionError):
            async with pace.long():
                raise ZeroDivisionError
        log: list[str] = []
        await long_pass(pace, "alone", log)
        assert len(log) == PIECES

    run(work())
