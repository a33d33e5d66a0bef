"""The shared-memory region that carries tensors between the two sides of one connection.

    byte 0                           HEADER_BYTES                                     lane 1
    | nonce | call ring | answer ring | lane 0: request 0 | request 1 | reply 0 | reply 1 | ...
                                                <- slot_bytes -->

The TEE side makes the region, the GPU side maps it. Each lane (one micro-batch on its way through the layers)
has two slots (a partition with three calls at once: three), each a request and a reply area, so that one slot can be
filled or emptied while the other is computed on (double buffering):

    FREE --TEE writes request, sends Call--> CALLED --GPU side writes reply, sends Done--> ANSWERED
      ^                                                                                       |
      '------------------------------- TEE copies the reply out ------------------------------'

The state of a slot is never stored in the region, where the other side could change it: the TEE side knows
it from its own program order (lanes.py, offload.py). Beside the payload the region holds
the two rings of doorbell.py, through which the messages themselves may go.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets

import posix_ipc
import torch

from asynctsqp.doorbell import RING_BYTES
from asynctsqp.errors import SharedMemoryError
from asynctsqp.layouts import Layout, tensors_in
from asynctsqp.limits import MAX_LANES, MAX_SLOTS, SLOT_ALIGNMENT
from asynctsqp.messages import NONCE_BYTES

# posix_ipc hands a name to C as it is, and crashes on some (a zero byte, for one)
NAME = re.compile(r"/[A-Za-z0-9._-]{1,200}")
NONCE_AREA_BYTES = 64
HEADER_BYTES = -(-(NONCE_AREA_BYTES + 2 * RING_BYTES) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

SlotTensors = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]  # inputs, outputs


class Region:
    """One mapped region. `close()` when nothing reads or writes it any more."""

    def __init__(self, name: str, memory: mmap.mmap, nonce: bytes, lanes: int, slots: int, slot_bytes: int) -> None:
        """nonce: what only a process that has mapped this very region can know; private from here on."""
        self.name = name
        self.nonce = nonce
        self.memory = memory
        self.lanes = lanes
        self.slots = slots
        self.slot_bytes = slot_bytes
        # tensors keep this view alive, and the mapping with it: of a bare mmap torch would hold no part
        self._view = memoryview(memory)

    @classmethod
    def create(cls, name: str | None, lanes: int, slots: int, slot_bytes: int) -> Region:
        """Makes, reserves and maps a region; the caller unlinks the name as soon as the peer has mapped it.

        name: an explicit name (a Gramine manifest must know it), or None for a random one.
        Raises SharedMemoryError where the name is taken or /dev/shm has no room.
        """
        name = name or f"/asynctsqp-{secrets.token_hex(8)}"
        if not NAME.fullmatch(name):
            raise SharedMemoryError(f"{name!r} is no name for shared memory: a slash, then letters, digits, . _ or -")
        size = _region_bytes(lanes, slots, slot_bytes)
        try:
            shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise SharedMemoryError(f"shared memory {name} exists already: choose another --shm-name") from None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise SharedMemoryError(f"cannot make shared memory {name}: {error}") from None
        try:
            _reserve(shared.fd, size)
            memory = mmap.mmap(shared.fd, size)
        except (OSError, OverflowError, ValueError) as error:
            _unlink(name)
            raise SharedMemoryError(
                f"/dev/shm has no room for {size >> 20} MiB ({error}): free some, or use a smaller "
                "--slot-bytes or --lanes, or --transport binary"
            ) from None
        finally:
            shared.close_fd()
        nonce = secrets.token_bytes(NONCE_BYTES)
        memory[:NONCE_BYTES] = nonce
        return cls(name, memory, nonce, lanes, slots, slot_bytes)

    @classmethod
    def attach(cls, name: str, lanes: int, slots: int, slot_bytes: int) -> Region:
        """Maps a region that the other side made. Raises SharedMemoryError if it is not there or too small."""
        sensible = 1 <= lanes <= MAX_LANES and 1 <= slots <= MAX_SLOTS
        if not (sensible and slot_bytes > 0 and slot_bytes % SLOT_ALIGNMENT == 0):
            raise SharedMemoryError("the region's lanes, slots or slot size make no sense")
        if not NAME.fullmatch(name):
            raise SharedMemoryError("that is no name for shared memory")
        size = _region_bytes(lanes, slots, slot_bytes)
        try:
            shared = posix_ipc.SharedMemory(name)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise SharedMemoryError(f"no shared memory of that name here ({type(error).__name__})") from None
        try:
            if shared.size < size:
                raise SharedMemoryError("the region is smaller than its description")
            memory = mmap.mmap(shared.fd, size)
            return cls(name, memory, memory[:NONCE_BYTES], lanes, slots, slot_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise SharedMemoryError(f"cannot map the region: {error}") from None
        finally:
            shared.close_fd()

    def call_ring(self) -> memoryview:
        """Where calls go to the GPU side: a view."""
        return memoryview(self.memory)[NONCE_AREA_BYTES : NONCE_AREA_BYTES + RING_BYTES]

    def answer_ring(self) -> memoryview:
        """Where answers come from: a view."""
        return memoryview(self.memory)[NONCE_AREA_BYTES + RING_BYTES : NONCE_AREA_BYTES + 2 * RING_BYTES]

    def unlink(self) -> None:
        """Takes the name away; the mappings stay. From here on a `kill -9` of both sides leaks nothing."""
        _unlink(self.name)

    def slot(self, lane: int, slot: int) -> tuple[memoryview, memoryview]:
        """A slot's request area and its reply area: views."""
        request = HEADER_BYTES + (lane * 2 * self.slots + slot) * self.slot_bytes
        reply = request + self.slots * self.slot_bytes
        return self._view[request : request + self.slot_bytes], self._view[reply : reply + self.slot_bytes]

    def tensors(self, lane: int, slot: int, layout: Layout) -> SlotTensors:
        """The inputs in a slot's request area and the outputs in its reply area: views."""
        request, reply = self.slot(lane, slot)
        return tensors_in(request, layout.inputs), tensors_in(reply, layout.outputs)

    def whole(self) -> torch.Tensor:
        """All of it as bytes, for registering with a device: a view."""
        return torch.frombuffer(self._view, dtype=torch.uint8)

    def close(self) -> None:
        """Unmaps, or leaves that to the last view that is still alive (an error's traceback may hold one)."""
        self._view = memoryview(b"")
        with contextlib.suppress(BufferError):
            self.memory.close()


def _unlink(name: str) -> None:
    """Whoever may open it may have done so before us."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


def _reserve(descriptor: int, size: int) -> None:
    """Without the reservation a full /dev/shm would be a SIGBUS at some later write.

    An enclave's library OS may only be able to grow the file; how much room there is the host says anyway.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
            raise
        os.ftruncate(descriptor, size)


def _region_bytes(lanes: int, slots: int, slot_bytes: int) -> int:
    return HEADER_BYTES + lanes * 2 * slots * slot_bytes
