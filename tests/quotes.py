"""DCAP quotes built by hand, at the offsets of Intel's tables, and machines that seem to make them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

MRENCLAVE, MRSIGNER = bytes(range(32)), bytes(range(100, 132))
MRTD, RTMR = b"\x11" * 48, tuple(bytes([0x20 + number]) * 48 for number in range(4))
HEADER_BYTES, SGX_BYTES, TDX_BYTES = 48, 384, 584
PROD_ID, SVN = 7, 3

Make = Callable[[bytes], bytes]  # report data -> a quote


def place(memory: bytearray, offset: int, data: bytes) -> None:
    memory[offset : offset + len(data)] = data


def header(version: int, tee_type: int, key_type: int = 2) -> bytes:
    memory = bytearray(HEADER_BYTES)
    place(memory, 0, version.to_bytes(2, "little"))
    place(memory, 2, key_type.to_bytes(2, "little"))
    place(memory, 4, tee_type.to_bytes(4, "little"))
    place(memory, 12, bytes.fromhex("939a7233f79c4ca9940a0db3957f0607"))  # Intel's quoting enclave
    return bytes(memory)


def sgx_quote(
    data: bytes,
    version: int = 3,
    mrenclave: bytes = MRENCLAVE,
    mrsigner: bytes = MRSIGNER,
    prod_id: int = PROD_ID,
    svn: int = SVN,
    flags: int = 0b101,  # initialised, 64 bits
) -> bytes:
    body = bytearray(SGX_BYTES)
    place(body, 48, flags.to_bytes(8, "little"))
    place(body, 64, mrenclave)
    place(body, 128, mrsigner)
    place(body, 256, prod_id.to_bytes(2, "little"))
    place(body, 258, svn.to_bytes(2, "little"))
    place(body, 320, data)
    return signed(header(version, 0) + bytes(body))


def tdx_quote(data: bytes, mrtd: bytes = MRTD, rtmrs: tuple[bytes, ...] = RTMR, attributes: int = 0) -> bytes:
    body = bytearray(TDX_BYTES)
    place(body, 120, attributes.to_bytes(8, "little"))
    place(body, 136, mrtd)
    for number, rtmr in enumerate(rtmrs):
        place(body, 328 + 48 * number, rtmr)
    place(body, 520, data)
    return signed(header(4, 0x81) + bytes(body))


def signed(quote: bytes) -> bytes:
    """With a signature by nobody, in the form that readers expect: zeros, and an empty certificate."""
    certificate = b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"
    certified = bytes(SGX_BYTES + 64) + bytes(2) + certification(5, certificate)  # the quoting enclave's report
    if quote[0] == 4:
        certified = certification(6, certified)
    signature = bytes(64) + bytes(64) + certified
    return quote + len(signature).to_bytes(4, "little") + signature


def certification(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "little") + len(data).to_bytes(4, "little") + data


@contextlib.contextmanager
def pseudo_files(directory: Path, make: Make, kind: bytes = b"dcap\n") -> Iterator[Path]:
    """As Gramine's /dev/attestation: pipes, behind which a thread plays the quoting enclave."""
    directory.mkdir()
    (directory / "attestation_type").write_bytes(kind)
    asked, answered = directory / "user_report_data", directory / "quote"
    os.mkfifo(asked)
    os.mkfifo(answered)
    thread = threading.Thread(target=_answer, args=(asked, answered, make))
    thread.start()
    try:
        yield directory
    finally:
        asked.write_bytes(b"end")
        thread.join()


def _answer(asked: Path, answered: Path, make: Make) -> None:
    while len(data := asked.read_bytes()) == 64:
        answered.write_bytes(make(data))
