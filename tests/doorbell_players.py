"""Two processes that play ping-pong over a doorbell: `python -m tests.doorbell_players SEED ROUNDS SLEEP_S`.

Exits with an error if a message is lost, late or out of order; prints how often each side was woken.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import socket
import sys
import time
from types import FrameType
from typing import Any
from unittest import mock

import uvloop

from asynctsqp import doorbell
from asynctsqp.doorbell import LOOKS, RING_BYTES, Doorbell, Ring

# Short, so that a side parks some thousand times a second, and a message often comes just then
SPIN_S = 0.0001
LATE_S = 8.0  # more than a busy machine keeps a process waiting, less than the sleep that a lost wake-up would cost
HESITATIONS = 0.05  # of the lines
MOST_AT_ONCE = 4  # messages in a row


def linger(seconds: float) -> None:
    """No timer is as exact as this."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def hesitate(chance: random.Random) -> None:
    """From here on this thread stops now and then between two lines of the doorbell, wherever that may hurt."""

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        if chance.random() < HESITATIONS:
            linger(chance.uniform(0, 2 * SPIN_S))
        return at_line

    def at_call(frame: FrameType, event: str, argument: object) -> Any:
        return at_line if frame.f_code.co_filename == doorbell.__file__ else None

    sys.settrace(at_call)


class Player:
    """One end. Wake-ups go through a socket, as ZeroMQ's would."""

    def __init__(self, outgoing: Ring, incoming: Ring, line: socket.socket, chance: random.Random) -> None:
        self.woken = 0
        self._line = line
        self._chance = chance
        self._doorbell = Doorbell(outgoing, incoming, lambda: line.send(b"!"), looks=lambda: LOOKS)
        asyncio.get_running_loop().add_reader(line, self._wake)

    async def send(self, numbers: range) -> None:
        """After a pause that often ends just when the other side parks."""
        await self._pause()
        for number in numbers:
            self._doorbell.send(number.to_bytes(8, "little"))

    async def receive(self, numbers: range) -> None:
        for number in numbers:
            came = int.from_bytes(await self._doorbell.receive(), "little")
            if came != number:
                raise ValueError(f"message {came} came instead of {number}")

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._line)
        self._doorbell.close()

    def _wake(self) -> None:
        self.woken += len(self._line.recv(1 << 16))
        self._doorbell.wake()

    async def _pause(self) -> None:
        match self._chance.randrange(10):
            case 0:
                await asyncio.sleep(0)
            case 1:
                await asyncio.sleep(self._chance.uniform(0, 4 * SPIN_S))
            case 2 | 3:
                pass
            case _:
                linger(self._chance.uniform(0.5, 2.5) * SPIN_S)


async def play(player: Player, seed: str, rounds: int, serves: bool) -> None:
    """Bursts there and back. Raises TimeoutError where nothing goes on for LATE_S."""
    burst = random.Random(seed)  # the same for both
    first = 0
    for _ in range(rounds):
        numbers = range(first, first + burst.randint(1, MOST_AT_ONCE))
        first = numbers.stop
        try:
            async with asyncio.timeout(LATE_S):
                if serves:
                    await player.send(numbers)
                await player.receive(numbers)
                if not serves:
                    await player.send(numbers)
        except TimeoutError:
            raise TimeoutError(f"none of the messages {numbers.start} to {numbers.stop} for {LATE_S} s") from None


async def run(memory: memoryview, line: socket.socket, seed: str, rounds: int, serves: bool) -> None:
    rings = [Ring(memory[:RING_BYTES]), Ring(memory[RING_BYTES:])]
    outgoing, incoming = rings if serves else reversed(rings)
    line.setblocking(False)
    chance = random.Random(f"{seed} {serves}")
    player = Player(outgoing, incoming, line, chance)
    hesitate(chance)
    try:
        await play(player, seed, rounds, serves)
    finally:
        sys.settrace(None)
        player.close()
    os.write(sys.stdout.fileno(), f"{player.woken}\n".encode())  # in one piece: the other side prints too


def play_side(memory: memoryview, line: socket.socket, seed: str, rounds: int, serves: bool) -> int:
    try:
        uvloop.run(run(memory, line, seed, rounds, serves))
    except Exception as error:
        print(f"{'serving' if serves else 'answering'} side: {error!r}", file=sys.stderr, flush=True)
        return 1
    return 0


def main(seed: str, rounds: int, sleep_s: float) -> int:
    memory = memoryview(mmap.mmap(-1, 2 * RING_BYTES))
    ours, theirs = socket.socketpair()
    with mock.patch.multiple(doorbell, SPIN_S=SPIN_S, SLEEP_S=sleep_s):
        child = os.fork()
        if child == 0:
            os._exit(play_side(memory, theirs, seed, rounds, serves=False))
        failed = play_side(memory, ours, seed, rounds, serves=True)
    _, status = os.waitpid(child, 0)
    return failed or os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
