"""Reading a DCAP quote: SGX in versions 3 and 4, TDX (1.0) in version 4.

    | header 48 | report body 384 (SGX) or 584 (TDX) | signature length 4 | signature |      all little-endian

Layouts: Intel SGX DCAP ECDSA Quote Library API, appendix A (versions 3 and 4); Intel TDX DCAP Quote Generation Library
API, appendix A (version 4).

Covered: every field is read inside the bytes that are there; a quote that is cut, extended, or of another kind is
refused.
Not covered: whether anybody signed it. The signature is bytes here; dcap.py asks a library about it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from asynctsqp.errors import AttestationError

HEADER = struct.Struct("<HHI2s2s16s20s")  # version, key type, TEE type, QE and PCE versions, vendor, user data
LENGTH = struct.Struct("<I")
# cpu_svn, misc_select, -, ext_prod_id, flags, xfrm, mr_enclave, -, mr_signer, -, config_id, prod_id, svn, config_svn,
# -, family_id, report_data
SGX_BODY = struct.Struct("<16sI12s16sQQ32s32s32s32s64sHHH42s16s64s")
# tcb_svn, mr_seam, mr_signer_seam, seam_attributes, td_attributes, xfam, mr_td, mr_config_id, mr_owner,
# mr_owner_config, rtmr 0 to 3, report_data
TDX_BODY = struct.Struct("<16s48s48s8sQ8s48s48s48s48s48s48s48s48s64s")

SGX, TDX = 0, 0x81  # TEE types
SGX_DEBUG = 1 << 1  # of ATTRIBUTES.FLAGS
TDX_UNTRUSTED = 0xFF  # of TD_ATTRIBUTES: any bit of this group means that the host may look inside
ECDSA_P256 = 2
MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class SgxReport:
    """What the processor says about an enclave."""

    mr_enclave: bytes
    mr_signer: bytes
    isv_prod_id: int
    isv_svn: int
    debug: bool
    report_data: bytes


@dataclass(frozen=True)
class TdxReport:
    """What the TDX module says about a trust domain."""

    mr_td: bytes
    rtmrs: tuple[bytes, ...]
    debug: bool
    report_data: bytes


@dataclass(frozen=True)
class Quote:
    """A quote's header and body."""

    version: int
    report: SgxReport | TdxReport

    @classmethod
    def parse(cls, data: bytes) -> Quote:
        """Raises AttestationError for anything but exactly one quote of a kind that is named above."""
        if not HEADER.size <= len(data) <= MOST_BYTES:
            raise AttestationError(f"a quote of {len(data)} bytes: that is none")
        version, key_type, tee_type, *_ = HEADER.unpack_from(data)
        if key_type != ECDSA_P256:
            raise AttestationError(f"the quote's key is of type {key_type}: only ECDSA with P-256 is known")
        body = _body(version, tee_type)
        start = HEADER.size + body.size
        if len(data) < start + LENGTH.size:
            raise AttestationError("the quote is cut off in its report")
        (signature,) = LENGTH.unpack_from(data, start)
        if len(data) != start + LENGTH.size + signature or signature == 0:
            raise AttestationError("the quote is cut off in its signature, or longer than it says")
        fields = body.unpack_from(data, HEADER.size)
        return cls(version, _sgx(fields) if body is SGX_BODY else _tdx(fields))


def _body(version: int, tee_type: int) -> struct.Struct:
    match version, tee_type:
        case ((3 | 4), 0):
            return SGX_BODY
        case 4, 0x81:
            return TDX_BODY
    raise AttestationError(f"a quote of version {version} for a TEE of type {tee_type:#x}: only SGX 3, 4 and TDX 4")


def _sgx(fields: tuple[bytes | int, ...]) -> SgxReport:
    flags, mr_enclave, mr_signer, prod_id, svn = fields[4], fields[6], fields[8], fields[11], fields[12]
    return SgxReport(
        _bytes(mr_enclave), _bytes(mr_signer), int(prod_id), int(svn), bool(int(flags) & SGX_DEBUG), _bytes(fields[-1])
    )


def _tdx(fields: tuple[bytes | int, ...]) -> TdxReport:
    rtmrs = tuple(_bytes(field) for field in fields[10:14])
    return TdxReport(_bytes(fields[6]), rtmrs, bool(int(fields[4]) & TDX_UNTRUSTED), _bytes(fields[-1]))


def _bytes(field: bytes | int) -> bytes:
    return field if isinstance(field, bytes) else b""
