"""The TEE side's command under what Gramine forbids: `... -m tests.gramine_shim REPORT WRITABLE ATTESTATION -- FLAGS`.

An audit hook (PEP 578) sees each of these calls of Python before it is made, and makes it fail as Gramine would. A
seccomp filter answers system calls that Gramine lacks as Gramine does, whoever makes them: "not implemented". What is
left, the test looks for in /proc. The pseudo-files of attestation are the test's.

    AF_UNIX      bind, connect: never to the host. (A pair of them inside a process is fine: event loops have one.)
    processes    fork, exec, subprocess, posix_spawn
    semaphores   POSIX ones, and the locks of multiprocessing
    files        written or made only under WRITABLE and in /dev/shm; the model's never mapped
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from pathlib import Path
from typing import Any, NoReturn

PROCESSES = {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"}
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = ("/dev/null", "/dev/tty")

# By their numbers on x86-64: what the list in Gramine's Documentation/devel/features.md has as missing, of what a
# program like this one might use (but rseq, which glibc has asked for by then). And what starts processes, which the
# manifest forbids.
MISSING = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "io_setup": 206,
    "shmget": 29,
    "shmat": 30,
    "shmctl": 31,
    "semget": 64,
    "semop": 65,
    "semctl": 66,
    "semtimedop": 220,
    "mremap": 25,
    "memfd_create": 319,
    "membarrier": 324,
    "userfaultfd": 323,
    "statx": 332,
    "signalfd": 282,
    "signalfd4": 289,
    "timerfd_create": 283,
    "timer_create": 222,
    "inotify_init1": 294,
    "splice": 275,
    "copy_file_range": 326,
    "getrusage": 98,
    "times": 100,
    "prctl": 157,
    "seccomp": 317,
    "set_mempolicy": 238,
    "get_mempolicy": 239,
    "pkey_alloc": 330,
    "preadv2": 327,
    "perf_event_open": 298,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "execveat": 322,
}
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER = 22, 38, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of the filter
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def main() -> int:
    report, writable, attestation, dashes, *flags = sys.argv[1:]
    assert dashes == "--"
    import _multiprocessing

    import posix_ipc

    from asynctsqp import tee
    from asynctsqp.attestation import evidence

    evidence.GRAMINE = Path(attestation)
    allowed = (os.path.realpath(writable), "/dev/shm", os.path.realpath(attestation))
    log = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def refuse(what: str) -> NoReturn:
        os.write(log, f"{what}\n".encode())
        raise OSError(errno.EACCES, f"Gramine has no {what}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.bind", "socket.connect") and isinstance(arguments[1], str | bytes):
            refuse(f"Unix socket {event}")
        if event in PROCESSES:
            refuse(event)
        if event in CHANGES and not _within(arguments[0], allowed):
            refuse(f"{event} {arguments[0]!r}")
        if event == "open" and _writes(arguments) and not _within(arguments[0], allowed):
            refuse(f"open for writing {arguments[0]!r}")
        if event == "mmap.__new__" and arguments[0] != -1:
            name = os.readlink(f"/proc/self/fd/{arguments[0]}")
            if not name.startswith("/dev/shm/"):
                refuse(f"mapping of {name}")

    class NoSemaphore:
        SEM_VALUE_MAX = _multiprocessing.SemLock.SEM_VALUE_MAX

        def __init__(self, *_: Any, **__: Any) -> None:
            refuse("POSIX semaphore")

    posix_ipc.Semaphore = _multiprocessing.SemLock = NoSemaphore
    sys.addaudithook(hook)
    forbid(list(MISSING.values()))
    sys.argv = ["asynctsqp.tee", *flags]
    return tee.main()


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid(numbers: list[int]) -> None:
    """From here on these system calls fail with ENOSYS, in this process and all its threads to come."""
    count = len(numbers)
    jumps = [struct.pack("HBBI", EQUAL, count - index, 0, number) for index, number in enumerate(numbers)]
    ends = struct.pack("HBBI", RETURN, 0, 0, ALLOW) + struct.pack("HBBI", RETURN, 0, 0, FAIL | errno.ENOSYS)
    instructions = struct.pack("HBBI", LOAD, 0, 0, 0) + b"".join(jumps) + ends
    library = ctypes.CDLL(None, use_errno=True)
    program = _Program(count + 3, instructions)
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(
        PR_SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no filter of system calls can be set here")


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & WRITING) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))


def _within(path: Any, allowed: tuple[str, ...]) -> bool:
    if isinstance(path, int):
        return True  # opened before, and checked then
    real = os.path.realpath(os.fsdecode(path))
    return real in DEVICES or any(real == top or real.startswith(top + "/") for top in allowed)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
