"""A process that keeps rewriting shared memory under the feet of both sides: `-m tests.flipper NAME SEED PAUSE PARTS`.

PARTS are START:END, in bytes. Runs of bytes in them are toggled, and toggled back, as fast as it can: what is read
twice is read differently. It ends when its standard input closes. (It imports nothing of ours: it is started often.)
"""

from __future__ import annotations

import mmap
import random
import sys
import threading
import time

import numpy as np
import numpy.typing as npt
import posix_ipc


def main() -> None:
    name, seed, pause, *words = sys.argv[1:]
    shared = posix_ipc.SharedMemory(name)
    memory = np.frombuffer(mmap.mmap(shared.fd, shared.size), np.uint8)
    parts = [memory[slice(*map(int, word.split(":")))] for word in words]
    generator = random.Random(int(seed))
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    print("flipping", flush=True)
    while not ended.is_set():
        if parts:
            burst(generator, generator.choice(parts))
        time.sleep(generator.random() * float(pause))


def burst(generator: random.Random, part: npt.NDArray[np.uint8]) -> None:
    start = generator.randrange(len(part))
    run, mask = part[start : start + generator.choice((1, 2, 8, 64))], np.uint8(1 << generator.randrange(8))
    for _ in range(generator.choice((1, 2, 200))):
        np.bitwise_xor(run, mask, out=run)


if __name__ == "__main__":
    main()
