"""A GPU side that tells what it holds: `python -m tests.telling_gpu FLAGS`, the real command beside one more thread.

For each line on standard input, a JSON list on standard output: bytes that malloc has given out, in which libzmq keeps
its messages, and blocks that Python's own allocator has. What is free, and kept for the next use, is in neither.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading

from asynctsqp.gpu import main

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Mallinfo(ctypes.Structure):
    """struct mallinfo2, as in mallinfo(3)."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def tell() -> None:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    for _ in sys.stdin:
        gc.collect()
        malloc = mallinfo()
        print(json.dumps([malloc.uordblks + malloc.hblkhd, sys.getallocatedblocks()]), flush=True)


if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    sys.exit(main())
