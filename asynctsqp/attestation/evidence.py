"""What the enclave says about itself: a quote over the TLS key, the configuration and the client's nonce.

    user report data (64 bytes) =
        SHA-256("asynctsqp attestation 1" || key hash || SHA-256(configuration))
     || SHA-256(nonce)

The key hash is the SHA-256 of the certificate's SubjectPublicKeyInfo in DER; the configuration is JSON with sorted
names and no blanks, of the options that matter and the model's fingerprint, and goes to the client with the quote
(service/attestation.py has both). Both ends make this with the functions below.

Covered: a quote is for this key, this configuration and this nonce, and for nothing else; quotes that are asked for at
once do not mix.
Not covered: whether the quote is genuine and whose enclave it is (the client's part: asynctsqp.verify); what the
enclave does with its key. The model's fingerprint samples large tensors: the files themselves are in the enclave's
measurement where they are trusted files of its manifest.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from asynctsqp.errors import AttestationError

DOMAIN = b"asynctsqp attestation 1"
GRAMINE = Path("/dev/attestation")
TSM = Path("/sys/kernel/config/tsm/report")  # Linux 6.7 and newer, in a TDX guest
LEAST_NONCE_BYTES, MOST_NONCE_BYTES = 16, 64
MOST_QUOTE_BYTES = 1 << 16


def canonical(configuration: Mapping[str, Any]) -> bytes:
    """The one way to write a configuration down."""
    return msgspec.json.encode(configuration, order="sorted")


def report_data(key_hash: bytes, configuration: Mapping[str, Any], nonce: bytes) -> bytes:
    """64 bytes for a quote. key_hash: 32 bytes. Raises AttestationError for a nonce that is too short or too long."""
    if not LEAST_NONCE_BYTES <= len(nonce) <= MOST_NONCE_BYTES:
        raise AttestationError(f"a nonce has {LEAST_NONCE_BYTES} to {MOST_NONCE_BYTES} bytes, not {len(nonce)}")
    bound = hashlib.sha256(DOMAIN + key_hash + hashlib.sha256(canonical(configuration)).digest()).digest()
    return bound + hashlib.sha256(nonce).digest()


class Quoter(Protocol):
    """A machine's own interface to its quotes."""

    def quote(self, data: bytes) -> bytes:
        """data: 64 bytes -> a quote over them. Blocks. Raises AttestationError where there is none to be had."""


class GramineQuoter:
    """Pseudo-files of Gramine. The report data are the process's: one quote at a time."""

    def __init__(self, directory: Path = GRAMINE) -> None:
        """Raises AttestationError where the manifest does not ask for DCAP quotes."""
        self._directory = directory
        self._turn = threading.Lock()
        kind = _read(directory / "attestation_type").strip()
        if kind != b"dcap":
            shown = kind.decode("ascii", "replace")[:20]
            raise AttestationError(
                f"this enclave cannot be attested: its type of attestation is {shown!r}; set "
                'sgx.remote_attestation = "dcap" in the manifest'
            )

    def quote(self, data: bytes) -> bytes:
        with self._turn:  # a caller that is cancelled leaves its thread behind, between these two lines maybe
            _write(self._directory / "user_report_data", data)
            return _read(self._directory / "quote")


class TsmQuoter:
    """The kernel's interface of confidential guests. Each quote has a directory of its own."""

    def __init__(self, directory: Path = TSM) -> None:
        """Raises AttestationError where the kernel has no such interface."""
        if not directory.is_dir():
            raise AttestationError(f"no reports at {directory}: not a TDX guest, or no tdx_guest module")
        self._directory = directory

    def quote(self, data: bytes) -> bytes:
        report = self._directory / f"asynctsqp-{secrets.token_hex(8)}"
        try:
            report.mkdir()
        except OSError as error:
            raise AttestationError(f"cannot make a report in {self._directory}: {error.strerror}") from None
        try:
            _write(report / "inblob", data)
            return _read(report / "outblob")
        finally:
            report.rmdir()


def quoter(gramine: Path | None = None, tsm: Path | None = None) -> Quoter:
    """This machine's. Raises AttestationError where there is none."""
    gramine, tsm = gramine or GRAMINE, tsm or TSM
    if gramine.is_dir():
        return GramineQuoter(gramine)
    if tsm.is_dir():
        return TsmQuoter(tsm)
    raise AttestationError(f"nothing here makes quotes: neither {gramine} (Gramine) nor {tsm} (TDX)")


class Attestation:
    """What a service shows to a client that asks (service.attestation.Evidence)."""

    def __init__(self, quoter: Quoter, key_hash: bytes, configuration: Mapping[str, Any]) -> None:
        """key_hash: of the key that the service shows."""
        self._quoter = quoter
        self._key_hash = key_hash
        self._configuration = configuration

    async def quote(self, nonce: bytes) -> dict[str, Any]:
        """The quote, as JSON has it. Raises AttestationError."""
        data = report_data(self._key_hash, self._configuration, nonce)
        quote = await asyncio.to_thread(self._quoter.quote, data)
        return {"format": 1, "quote": base64.b64encode(quote).decode()}


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_QUOTE_BYTES + 1)
    except OSError as error:
        raise AttestationError(f"cannot read {file}: {error.strerror}") from None
    if not 0 < len(data) <= MOST_QUOTE_BYTES:
        raise AttestationError(f"{file} gave {len(data)} bytes")
    return data


def _write(file: Path, data: bytes) -> None:
    """In one system call, as both interfaces ask for; the file is never made."""
    try:
        descriptor = os.open(file, os.O_WRONLY)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AttestationError(f"cannot write {file}: {error.strerror}") from None
    if written != len(data):
        raise AttestationError(f"{file} took {written} of {len(data)} bytes")
