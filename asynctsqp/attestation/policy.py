"""Whom a client trusts with its prompt: a small TOML file, and what a quote must say to pass.

    [sgx]                        or, for a TDX guest,  [tdx]
    mrenclave = ["<64 hex>"]                           mrtd = ["<96 hex>"]
    mrsigner = "<64 hex>"                              rtmrs = ["", "<96 hex>", "<96 hex>", ""]     "" is any
    isv_prod_id = 0              with mrsigner: both
    min_isv_svn = 0

    [configuration]              what the enclave must have been started with; names as GET /attestation shows them
    protect = "full"
    partition = "shielded"
    mask_peer_key = ""           the one mask peer that is trusted; without this line, none is

    [tcb]
    statuses = ["UpToDate"]      what the verifier library may say about the platform (the default)

Covered: a quote passes by its exact measurement, or by its signer with product and version; a TDX guest by its firmware
with boot loader, kernel and command line (MRTD is the firmware's alone, which a provider's guests all share); an
enclave in debug mode never passes unless `allow_debug = true` says so, nor one with a mask peer that is not named.
Not covered: whether the quote is genuine (asynctsqp.attestation.dcap).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from asynctsqp.attestation.quote import Quote, SgxReport, TdxReport
from asynctsqp.errors import AttestationError, BadInputError, one_line


class _Sgx(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    mrenclave: tuple[str, ...] = ()
    mrsigner: str | None = None
    isv_prod_id: int | None = None
    min_isv_svn: int | None = None
    allow_debug: bool = False


class _Tdx(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    mrtd: tuple[str, ...]
    rtmrs: tuple[str, ...] = ()
    allow_debug: bool = False


class _Tcb(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    statuses: tuple[str, ...] = ("UpToDate",)


class _File(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    sgx: _Sgx | None = None
    tdx: _Tdx | None = None
    configuration: dict[str, Any] = {}
    tcb: _Tcb = _Tcb()


@dataclass(frozen=True)
class Policy:
    """A policy file, checked."""

    file: _File

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Raises BadInputError for a file that is missing, damaged, or would let everything pass."""
        try:
            file = msgspec.convert(tomllib.loads(path.read_text()), _File)
        except OSError as error:
            raise BadInputError(f"cannot read the policy {path}: {error.strerror}") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise BadInputError(f"the policy {path} cannot be used: {error}") from None
        if file.sgx is None and file.tdx is None:
            raise BadInputError(f"the policy {path} trusts nobody: it has neither [sgx] nor [tdx]")
        if file.sgx is not None:
            _check_sgx(path, file.sgx)
        if file.tdx is not None:
            _check_hex(path, "mrtd", file.tdx.mrtd, 48)
            _check_hex(path, "rtmrs", tuple(value for value in file.tdx.rtmrs if value), 48)
            if not file.tdx.mrtd or len(file.tdx.rtmrs) > 4:
                raise BadInputError(f"the policy {path} needs an mrtd, and has at most four rtmrs")
            if not all(file.tdx.rtmrs[1:3]) or len(file.tdx.rtmrs) < 3:
                raise BadInputError(
                    f"the policy {path} would let any system pass that this firmware starts: name rtmrs 1 and 2 as well"
                )
        return cls(file)

    @property
    def statuses(self) -> tuple[str, ...]:
        """Of the platform, that are good enough."""
        return self.file.tcb.statuses

    def check(self, quote: Quote) -> None:
        """Raises AttestationError where the quote is not of an enclave that is trusted."""
        match quote.report:
            case SgxReport():
                self._check_sgx(quote.report)
            case TdxReport():
                self._check_tdx(quote.report)

    def check_configuration(self, configuration: dict[str, Any]) -> None:
        """Raises AttestationError where the enclave runs with other options than the policy names."""
        if configuration.get("mask_peer_key") and "mask_peer_key" not in self.file.configuration:
            raise AttestationError("the enclave has a mask peer, which the policy does not name as mask_peer_key")
        for name, wanted in self.file.configuration.items():
            if name not in configuration or configuration[name] != wanted:
                found = one_line(repr(configuration.get(name)))
                raise AttestationError(f"the policy asks for {name} = {wanted!r}, the enclave has {found}")

    def _check_sgx(self, report: SgxReport) -> None:
        policy = self.file.sgx
        if policy is None:
            raise AttestationError("an SGX quote, and the policy has no [sgx]")
        _check_debug(report.debug, policy.allow_debug)
        if policy.mrenclave and report.mr_enclave.hex() not in _lower(policy.mrenclave):
            raise AttestationError(f"mrenclave is {report.mr_enclave.hex()}, which the policy does not have")
        if policy.mrsigner is not None and report.mr_signer.hex() != policy.mrsigner.lower():
            raise AttestationError(f"mrsigner is {report.mr_signer.hex()}, not the policy's")
        if policy.isv_prod_id is not None and report.isv_prod_id != policy.isv_prod_id:
            raise AttestationError(f"isv_prod_id is {report.isv_prod_id}, not {policy.isv_prod_id}")
        if policy.min_isv_svn is not None and report.isv_svn < policy.min_isv_svn:
            raise AttestationError(f"isv_svn is {report.isv_svn}, and must be at least {policy.min_isv_svn}")

    def _check_tdx(self, report: TdxReport) -> None:
        policy = self.file.tdx
        if policy is None:
            raise AttestationError("a TDX quote, and the policy has no [tdx]")
        _check_debug(report.debug, policy.allow_debug)
        if report.mr_td.hex() not in _lower(policy.mrtd):
            raise AttestationError(f"mrtd is {report.mr_td.hex()}, which the policy does not have")
        for number, wanted in enumerate(policy.rtmrs):
            if wanted and report.rtmrs[number].hex() != wanted.lower():
                raise AttestationError(f"rtmr {number} is {report.rtmrs[number].hex()}, not the policy's")


def _check_sgx(path: Path, policy: _Sgx) -> None:
    _check_hex(path, "mrenclave", policy.mrenclave, 32)
    _check_hex(path, "mrsigner", () if policy.mrsigner is None else (policy.mrsigner,), 32)
    by_signer = None not in (policy.mrsigner, policy.isv_prod_id, policy.min_isv_svn)
    if not policy.mrenclave and not by_signer:
        raise BadInputError(
            f"the policy {path} would let any enclave pass: name mrenclave, or mrsigner, isv_prod_id and min_isv_svn"
        )


def _check_hex(path: Path, name: str, values: tuple[str, ...], size: int) -> None:
    for value in values:
        try:
            good = len(bytes.fromhex(value)) == size
        except ValueError:
            good = False
        if not good:
            raise BadInputError(f"the policy {path}: {name} has {2 * size} hexadecimal digits, not {value[:100]!r}")


def _check_debug(debug: bool, allowed: bool) -> None:
    if debug and not allowed:
        raise AttestationError("the enclave runs in debug mode: its host can read everything in it")


def _lower(values: tuple[str, ...]) -> set[str]:
    return {value.lower() for value in values}
