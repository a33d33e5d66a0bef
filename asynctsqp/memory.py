"""How much memory is free, by the operating system's own account, and the refusal of what will not fit."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from asynctsqp.errors import BadInputError

# version of cgroups -> where they are mounted, the files of limit and use, how memory.stat calls the file cache
CGROUP_FILES = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}

KEPT = 256 << 20  # bytes of free memory at the heap's end
LARGEST = 32 << 20  # bytes of a block in the heap: glibc's own limit
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # mallopt(3)


def refuse_if_too_large(what: str, needed: int, arithmetic: str, free: int, advice: str) -> None:
    """Raises BadInputError where `needed` bytes are more than `free`, with the arithmetic that made them."""
    if needed > free:
        raise BadInputError(f"{what} needs {arithmetic} = {gib(needed)}; {gib(free)} are free: {advice}")


def gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def host_bytes(root: Path = Path("/")) -> int:
    """What there is for us in all: the machine's, and no more than the limit of each control group around us."""
    total = _numbers(root / "proc/meminfo").get("MemTotal:")
    limits = (_lines(group / limit) for group, limit, *_ in _groups(root))
    bounds = [int(lines[0]) for lines in limits if lines and lines[0].isdigit()]  # "max" is no limit
    return min([*bounds, sys.maxsize if total is None else total << 10])


def free_host_bytes(root: Path = Path("/")) -> int:
    """What may still be allocated: the machine's, and no more than each control group around us leaves.

    A system that tells nothing has all there could be.
    """
    return min([*_available(root), *_cgroup_headrooms(root)], default=sys.maxsize)


def _available(root: Path) -> Iterator[int]:
    kibibytes = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if kibibytes is not None:
        yield kibibytes << 10


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """One for each limit."""
    for group, *files in _groups(root):
        yield from _headroom(group, *files)


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Our group and the groups around it, with the names of their files."""
    for line in _lines(root / "proc/self/cgroup"):  # number:controllers:path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, use, prefix = CGROUP_FILES[1 if controllers else 2]
        group = PurePosixPath(path.lstrip("/"))
        for outer in (group, *group.parents):
            yield root / mount / outer, limit, use, prefix


def _headroom(group: Path, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    limit, usage = _lines(group / limit_file), _lines(group / usage_file)
    if limit and usage and limit[0].isdigit():  # "max" is no limit
        statistics = _numbers(group / "memory.stat")
        # cached files count as use, and make way for whoever asks
        cached = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        yield max(int(limit[0]) - int(usage[0]) + cached, 0)


def _numbers(file: Path) -> dict[str, int]:
    """Of lines as 'name number ...'."""
    lines = (line.split() for line in _lines(file))
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # another system, another version, or not ours to read
        return []


def keep_freed() -> None:
    """Tells the allocator to keep what is freed for what is asked for next, in one place for all threads.

    By itself glibc gives a prompt's large activations back to the system each time, from a thread's own arena above
    all, and the system zeroes the same pages anew for the next layer. To be called before there are other threads:
    those of numpy's library have arenas of their own, which later threads share.
    """
    with contextlib.suppress(AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, KEPT)):
            mallopt(parameter, value)


def give_back() -> None:
    """Gives the allocator's free memory back to the system, holes included.

    Reading a matrix takes and frees many megabytes around the few that stay; glibc keeps those holes. Milliseconds.
    """
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
