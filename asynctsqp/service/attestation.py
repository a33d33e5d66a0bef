"""What a client can check before it sends a prompt: a quote over the TLS key and over the configuration.

The quote itself comes from whoever knows the hardware (Evidence); this module says what it is about.

Covered: what `Binding` holds is what this process uses. Not covered: that the client compares the key in the quote
with the one of its own TLS connection, without which a quote proves nothing about that connection.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from asynctsqp import __version__
from asynctsqp.attestation.evidence import canonical
from asynctsqp.engine import Engine
from asynctsqp.service.api_errors import ApiError, invalid

MOST_NONCE = 64  # bytes
# for what the GPU side, or the host, can see or change
_OF_CONSEQUENCE = ("protect", "partition", "weight_bits", "dtype", "enclave", "enclave_unprotected_activations")


class Evidence(Protocol):
    """Whoever makes quotes."""

    async def quote(self, nonce: bytes) -> dict[str, Any]:
        """A quote that is about this service's Binding and this nonce, as JSON."""


@dataclass(frozen=True)
class Binding:
    """What a quote has to be about. key_hash: SHA-256 of the TLS public key (SPKI), 32 zero bytes without TLS."""

    key_hash: bytes
    configuration: dict[str, Any]

    @classmethod
    def of(cls, engine: Engine, key_hash: bytes | None) -> Binding:
        options = {name: getattr(engine.options, name) for name in _OF_CONSEQUENCE}
        # who makes the masks could read everything together with the GPU side: "" is the enclave itself
        peer = engine.options.mask_peer_key or ""
        about = {"version": __version__, "model": engine.fingerprint.hex(), "mask_peer_key": peer, **options}
        return cls(key_hash or bytes(32), about)

    @property
    def configuration_hash(self) -> bytes:
        """SHA-256 of the configuration as JSON with sorted keys and no blanks: 32 bytes."""
        return hashlib.sha256(canonical(self.configuration)).digest()

    def described(self) -> dict[str, Any]:
        return {
            "tls_key_sha256": self.key_hash.hex(),
            "configuration": self.configuration,
            "configuration_sha256": self.configuration_hash.hex(),
        }


async def attestation(evidence: Evidence | None, binding: Binding, nonce: str | None) -> dict[str, Any]:
    """What GET /attestation answers. nonce: hexadecimal, 16 to 64 bytes. Raises ApiError."""
    if evidence is None:
        raise ApiError(404, "no_evidence", "this service does not run in an enclave that can be attested")
    try:
        chosen = bytes.fromhex(nonce or "")
    except ValueError:
        chosen = b""
    if not 16 <= len(chosen) <= MOST_NONCE:
        raise invalid(f"nonce is 16 to {MOST_NONCE} bytes in hexadecimal", "nonce")
    return {"nonce": chosen.hex(), **binding.described(), **await evidence.quote(chosen)}
