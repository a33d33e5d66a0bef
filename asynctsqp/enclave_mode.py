"""What the TEE side does not do inside an enclave (`--enclave`, implied where /dev/attestation is).

Covered: a start that would hand private data to the host is refused in one line: prompts from arguments, files or
standard input (the host writes those), answers on standard output, partitions and levels of protection that show
activations, a mask peer on the GPU side's host, recordings of single calls with their times. What Gramine cannot do is
refused before it is tried: Unix sockets, child processes, regions whose name the manifest does not know. Sizes are
given, not guessed from what the host says of its memory. An error that nobody foresaw is one line with its class: no
traceback, whose lines could hold a prompt. No core is dumped.
Not covered: an enclave whose manifest is careless (gramine/README.md has the policy that the tests hold ours to);
times, lengths and counts, which the host sees anyway.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import resource
import sys
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from asynctsqp.endpoints import same_host
from asynctsqp.errors import BadInputError

PSEUDO_FILES = Path("/dev/attestation")
FORCE = "--enclave-unprotected-activations"
SIZES = "python -m tee_side.enclave_size prints what they make"
PR_SET_DUMPABLE = 4


def implied(pseudo_files: Path = PSEUDO_FILES) -> bool:
    """Whether Gramine's pseudo-files are here: this is an enclave, or `gramine-direct`, which is to behave as one."""
    return pseudo_files.is_dir()


def check_options(options: Any) -> None:
    """options: config.EngineOptions with `enclave`. Raises BadInputError."""
    shown = options.protect in ("none", "verify") or options.partition != "shielded"
    if shown and not options.enclave_unprotected_activations:
        raise BadInputError(
            f"--enclave: --protect {options.protect} with --partition {options.partition} shows the host activations, "
            f"from which prompts can be recovered: use --protect full, or force it with {FORCE}"
        )
    for name in ("stats", "log_rpc", "trace"):
        if getattr(options, name):
            raise BadInputError(f"--enclave: --{name.replace('_', '-')} would tell the host the times of single calls")
    if options.transport in ("auto", "shm") and not options.shm_name:
        raise BadInputError(
            f"--enclave: --transport {options.transport} needs --shm-name, the one region that the manifest allows; "
            "or use --transport binary"
        )
    if options.mask_peer is not None:
        check_gpu(options.mask_peer)
    needed = ["kv_memory", "threads"] + (["mask_memory"] if options.protect in ("mask", "full") else [])
    for name in needed:
        if getattr(options, name) is None:
            flag = name.replace("_", "-")
            raise BadInputError(f"--enclave needs --{flag}: the host is not asked how much there is ({SIZES})")


def check_gpu(gpu: str | None) -> None:
    """Raises BadInputError for a GPU side that an enclave cannot start or reach."""
    if gpu is None:
        raise BadInputError("--enclave starts no processes: start a GPU side on the host and name it with --gpu")
    if not gpu.startswith("tcp://"):
        raise BadInputError("--enclave: Gramine connects no Unix socket to the host: use tcp://127.0.0.1:PORT")


def check_peer(gpu: str | None, options: Any) -> None:
    """options: config.EngineOptions with `enclave`. Raises BadInputError where one host sees both halves."""
    if options.mask_peer is not None and same_host(gpu, options.mask_peer):
        raise BadInputError(
            "--enclave: the GPU side and the mask peer are on one host, as their endpoints say: it could put what they "
            "see together and read everything"
        )


def check_entrance(arguments: Any) -> None:
    """arguments: as tee.py parsed them. Raises BadInputError for a way in or out that the host sees."""
    given = {"--prompt": arguments.prompt, "--prompt-file": arguments.prompt_file}
    given |= {"--chat": arguments.chat or None, "--json": arguments.json or None}
    for flag, value in given.items():
        if value is not None:
            raise BadInputError(
                f"--enclave: the host would see what {flag} carries: prompts come in through --serve only"
            )
    if arguments.serve is None:
        raise BadInputError("--enclave: the host sees standard input and output: prompts come in through --serve only")
    if arguments.tls == "off":
        raise BadInputError("--enclave: without TLS the host reads every prompt: leave out --tls off")


def no_core_dumps() -> None:
    """Always: a core holds prompts. Where a system has no such limit there is nothing to be done."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hush() -> None:
    """For the rest of the process: nothing on standard error but lines that were written for it."""
    no_core_dumps()
    with contextlib.suppress(OSError, AttributeError):  # Gramine has no prctl; its host cannot attach to an enclave
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    faulthandler.disable()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.excepthook = _print_class
    threading.excepthook = lambda failure: _print_class(failure.exc_type)
    sys.unraisablehook = lambda failure: _print_class(failure.exc_type)


def _print_class(
    kind: type[BaseException], error: BaseException | None = None, traceback: TracebackType | None = None
) -> None:
    print(f"asynctsqp.tee: error: {kind.__name__}, of which an enclave says no more", file=sys.stderr)
