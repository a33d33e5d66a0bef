"""`python -m asynctsqp.gpu`: the untrusted GPU side as a process."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from asynctsqp.config import MODEL_HELP, OneLineParser
from asynctsqp.cores import default_threads, openmp
from asynctsqp.ending import at_once
from asynctsqp.endpoints import check_endpoint, local_endpoint
from asynctsqp.errors import AsynctsqpError, BadInputError, one_line
from asynctsqp.limits import MAX_THREADS, WEIGHT_DIGITS, WIRE_DTYPE_NAMES

DEFAULT_BIND = "tcp://127.0.0.1:5555"


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends us in order, as Ctrl-C does
    try:
        arguments = _parser().parse_args()
        if arguments.threads is not None and not 1 <= arguments.threads <= MAX_THREADS:
            raise BadInputError(f"--threads is 1 to {MAX_THREADS}")
        check_endpoint("--bind", arguments.bind)
        if arguments.mask_peer_secret is not None:
            _check_mask_peer(arguments)
        _serve(arguments)
    except AsynctsqpError as error:
        print(f"asynctsqp.gpu: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full /tmp, say
        print(f"asynctsqp.gpu: error: cannot serve: {one_line(error)}", file=sys.stderr)
        return BadInputError.exit_code
    except KeyboardInterrupt:  # before the event loop listens for signals
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="asynctsqp.gpu", description="Serve a LLaMA's matrix products to TEE sides.")
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bind", default=DEFAULT_BIND, metavar="ENDPOINT", help="tcp://HOST:PORT or ipc://PATH")
    where.add_argument(
        "--local",
        metavar="DIRECTORY",
        help="listen in it, remove it, and end when standard input closes (how a TEE side starts its own)",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, help="the only one to serve (default: any)")
    parser.add_argument(
        "--weight-bits",
        type=int,
        choices=tuple(WEIGHT_DIGITS),
        help="make integer weights, for --protect, before the first client asks for them",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for tensor work on the CPU")
    parser.add_argument(
        "--mask-peer-secret",
        type=Path,
        metavar="FILE",
        help="be a mask peer instead, with the secret key in this file (made if there is none); see docs/mask-peer.md",
    )
    return parser


def _check_mask_peer(arguments: argparse.Namespace) -> None:
    if arguments.local or arguments.bind.startswith("ipc://"):
        raise BadInputError("a mask peer belongs on another machine than the GPU side: --bind tcp://HOST:PORT")
    if arguments.dtype is not None:
        raise BadInputError("--dtype is not for a mask peer: its products are of integers")
    if arguments.weight_bits is not None:
        raise BadInputError("--weight-bits is not for a mask peer: it makes what its clients ask for")


def _serve(arguments: argparse.Namespace) -> None:
    threads = arguments.threads or default_threads()
    os.environ |= openmp(threads)
    with at_once(lambda: 0):
        from gpu_side import process  # takes seconds: after the arguments have been checked

    process.serve(
        arguments.bind if arguments.local is None else local_endpoint(arguments.local),
        process.Settings(
            arguments.model,
            arguments.device,
            arguments.dtype,
            arguments.weight_bits,
            threads,
            mask_peer_secret=arguments.mask_peer_secret,
        ),
        owned=arguments.local is not None,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a worker thread may be in the middle of a long load: nothing of it is worth waiting for
