"""Secret uniform words, each range of them handed out exactly once: AES-256 in counter mode.

A row of a mask takes whole AES blocks, so that any row's words can be made by themselves. That layout is shared with
the mask peer (gpu_side/mask_server), which is given a key and makes the same words.

Covered: every word that hides something comes from here. The key is the operating system's (`secrets`), made anew in
each process and for each mask peer's connection and never written anywhere, so a restarted or cloned-on-disk enclave
cannot repeat a stream; two ranges never overlap, whatever threads ask. Without the key the words cannot be told from
uniform ones as long as AES-256 is a pseudo-random permutation and far fewer than 2^64 blocks are used (NIST SP 800-38A,
6.5): secrecy is computational.
Not covered: what a mask peer does with its key; an enclave whose memory is copied while it runs, or whose AES leaks
through a side channel; AES-NI, which OpenSSL uses where the processor has it, takes the same time for all data.
"""

from __future__ import annotations

import secrets
import threading

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

Words = npt.NDArray[np.int32]

KEY_BYTES = 32
BLOCK_BYTES = 16
BLOCK_WORDS = 4
MOST_BLOCKS = 1 << 60  # of one key: 2^62 words; a birthday bound would show near 2^64
ZEROS = bytes(1 << 16)  # as much is made at once: the lock is held for some 25 us, and others can get their words


def new_key() -> bytes:
    """From the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def row_words(width: int) -> int:
    """Of the stream, for one row of a mask of so many words: whole AES blocks."""
    return -(-width // BLOCK_WORDS) * BLOCK_WORDS


def row_blocks(width: int) -> int:
    """Of one row, as addresses count them."""
    return row_words(width) // BLOCK_WORDS


class KeyStream:
    """One key's stream. Any number of threads may use it."""

    def __init__(self, key: bytes | None = None) -> None:
        """key: KEY_BYTES bytes that somebody else has too; None makes one that nobody else will know."""
        self._encryptor = Cipher(AES256(new_key() if key is None else key), CTR(bytes(BLOCK_BYTES))).encryptor()
        self._next = 0
        self._lock = threading.Lock()

    def take(self, words: int) -> int:
        """Sets aside a range that nobody else gets; returns its address (its first AES block).

        Raises OverflowError where the key is used up, which takes longer than any machine lives.
        """
        blocks = -(-words // BLOCK_WORDS)
        with self._lock:
            start = self._next
            if start + blocks > MOST_BLOCKS:
                raise OverflowError("this process has used up its key stream: start it again")
            self._next = start + blocks
        return start

    def words(self, address: int, shape: tuple[int, int]) -> Words:
        """The words of a range that was taken, in that order: the same whenever they are asked for. -> shape, int32."""
        count = shape[0] * shape[1]
        made = np.empty(count + BLOCK_WORDS, dtype=np.int32)
        self.fill(address, count, made)
        return made[:count].reshape(shape)

    def fill(self, address: int, count: int, room: Words) -> None:
        """`words`, into room that is there: [count + BLOCK_WORDS] int32, contiguous.

        The library asks for room for one block more than it writes.
        """
        view = room.view(np.uint8).data
        for start in range(0, 4 * count, len(ZEROS)):
            zeros = memoryview(ZEROS)[: 4 * count - start]
            nonce = (address + start // BLOCK_BYTES).to_bytes(BLOCK_BYTES, "big")
            with self._lock:
                self._encryptor.reset_nonce(nonce)
                self._encryptor.update_into(zeros, view[start:])
