"""`python -m asynctsqp.gpu`: the untrusted GPU side as a process."""

from __future__ import annotations

import argparse
import os
import sys

from asynctsqp.config import MODEL_HELP, OneLineParser
from asynctsqp.cores import default_threads, openmp
from asynctsqp.endpoints import check_endpoint
from asynctsqp.errors import AsynctsqpError, BadInputError
from asynctsqp.limits import MAX_THREADS, WIRE_DTYPE_NAMES

DEFAULT_BIND = "tcp://127.0.0.1:5555"


def main() -> int:
    try:
        arguments = _parser().parse_args()
        if arguments.threads is not None and not 1 <= arguments.threads <= MAX_THREADS:
            raise BadInputError(f"--threads is 1 to {MAX_THREADS}")
        check_endpoint("--bind", arguments.bind)
        _serve(arguments)
    except AsynctsqpError as error:
        print(f"asynctsqp.gpu: error: {error}", file=sys.stderr)
        return error.exit_code
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
        action="store_true",
        help="bind in a private directory, and end when standard input closes (how a TEE side starts its own)",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    parser.add_argument("--dtype", choices=WIRE_DTYPE_NAMES, help="the only one to serve (default: any)")
    parser.add_argument("--threads", type=int, metavar="N", help="for tensor work on the CPU")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    threads = arguments.threads or default_threads()
    os.environ |= openmp(threads)
    from gpu_side import process  # takes seconds: after the arguments have been checked

    process.serve(
        None if arguments.local else arguments.bind,
        arguments.model,
        arguments.device,
        arguments.dtype,
        threads,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a worker thread may be in the middle of a long load: nothing of it is worth waiting for
