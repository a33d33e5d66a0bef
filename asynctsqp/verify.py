"""`python -m asynctsqp.verify URL --policy FILE`: before a prompt is sent, who is it that would get it?

Covered: the key of this very TLS connection is the one in the quote, the nonce is ours and fresh, the configuration is
the one that the quote is about, the enclave is one of the policy's, the quote is genuine.
Not covered: later connections, unless they pin the key: `pin` is what curl takes as --pinnedpubkey, and
`--save-certificate` writes what a client is to be given as its only trusted certificate (httpx verify=). Not the
certificate's name or dates: the quote vouches for its key instead.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import secrets
import ssl
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from asynctsqp.attestation import dcap
from asynctsqp.attestation.evidence import report_data
from asynctsqp.attestation.policy import Policy
from asynctsqp.attestation.quote import Quote
from asynctsqp.config import OneLineParser
from asynctsqp.ending import ended
from asynctsqp.errors import AttestationError, BadInputError, one_line

NONCE_BYTES = 32
FORMAT = 1
MOST_ANSWER_BYTES = 1 << 20
TIMEOUT_S = 30


class Evidence(msgspec.Struct, frozen=True):
    """What GET /attestation answers, as far as it is needed here."""

    format: int
    quote: str  # base64
    configuration: dict[str, str | int | float | bool | None]


class _Error(msgspec.Struct, frozen=True):
    message: str


class _Refusal(msgspec.Struct, frozen=True):
    """What the service answers instead (service/api_errors.py)."""

    error: _Error


def main() -> int:
    return ended("asynctsqp.verify", _verify, "cannot write what was found")


def _verify() -> None:
    print(json.dumps(_verified(_parser().parse_args()), indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="asynctsqp.verify", description="Check whose enclave answers at a URL.")
    parser.add_argument("url", metavar="URL", help="as https://host:8443")
    parser.add_argument(
        "--policy", required=True, type=Path, metavar="FILE", help="see asynctsqp/attestation/policy.py"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--collateral", type=Path, metavar="FILE", help="JSON, for verifying without a network")
    how.add_argument("--pccs", metavar="URL", help="where to fetch collateral")
    how.add_argument(
        "--insecure-skip-signature",
        action="store_true",
        help="check everything but who signed: anybody can make such a quote",
    )
    parser.add_argument("--save-certificate", type=Path, metavar="FILE", help="PEM, to pin for later connections")
    return parser


def _verified(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was found. Raises AttestationError unless all of it is good."""
    policy = Policy.read(arguments.policy)
    nonce = secrets.token_bytes(NONCE_BYTES)
    certificate, evidence = fetch(arguments.url, nonce)
    quote = check(certificate, evidence, nonce, policy)
    if arguments.insecure_skip_signature:
        status = "NOT CHECKED"
        print("asynctsqp.verify: warning: nobody knows who signed this quote: it proves nothing", file=sys.stderr)
    else:
        status = dcap.verify(_quote_bytes(evidence), arguments.collateral, arguments.pccs, policy.statuses)
    if arguments.save_certificate is not None:
        _save(arguments.save_certificate, certificate)
    return {
        "signature": status,
        "kind": type(quote.report).__name__,
        "configuration": evidence.configuration,
        "tls_key_sha256": key_hash_of(certificate).hex(),
        "pin": "sha256//" + base64.b64encode(key_hash_of(certificate)).decode(),
    }


def check(certificate: bytes, evidence: Evidence, nonce: bytes, policy: Policy) -> Quote:
    """All but the signature. certificate: of this connection, in DER. Raises AttestationError."""
    quote = Quote.parse(_quote_bytes(evidence))
    try:
        expected = report_data(key_hash_of(certificate), evidence.configuration, nonce)
    except (OverflowError, ValueError):  # a number that JSON has and msgspec has not
        raise AttestationError("the evidence's configuration is none that a service makes") from None
    if not secrets.compare_digest(quote.report.report_data, expected):
        raise AttestationError("the quote is not about this connection's key, this configuration and this nonce")
    policy.check(quote)
    policy.check_configuration(evidence.configuration)
    return quote


def fetch(url: str, nonce: bytes) -> tuple[bytes, Evidence]:
    """-> the certificate of the connection, in DER, and the evidence that came over it. Raises AttestationError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise BadInputError(
            f"the URL is as https://host:8443, not {url[:120]!r}: without TLS there is no key to attest"
        )
    context = ssl.create_default_context()
    context.check_hostname = False  # the quote vouches for the key, whatever the certificate says
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=TIMEOUT_S, context=context)
    try:
        connection.connect()
        certificate = _certificate_of(connection)
        connection.request("GET", f"{parts.path.rstrip('/')}/attestation?nonce={nonce.hex()}")
        response = connection.getresponse()
        body = response.read(MOST_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise AttestationError(f"no evidence from {url}: {one_line(error)}") from None
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise AttestationError(f"{url} has no evidence: it answered {response.status}: {_reason(body)}")
    return certificate, _evidence(body)


def _reason(body: bytes) -> str:
    """The message of a service's error, or the beginning of whatever else that is."""
    try:
        return one_line(msgspec.json.decode(body, type=_Refusal).error.message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return one_line(body.decode("utf-8", "replace"))


def _certificate_of(connection: http.client.HTTPSConnection) -> bytes:
    """What the other end of this very connection has shown, in DER."""
    certificate: bytes | None = connection.sock.getpeercert(binary_form=True)
    if certificate is None:
        raise AttestationError("the other end has shown no certificate")
    return certificate


def key_hash_of(certificate: bytes) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of a certificate, both in DER: 32 bytes."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise AttestationError(f"the certificate cannot be read: {one_line(error)}") from None
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _evidence(body: bytes) -> Evidence:
    try:
        evidence = msgspec.json.decode(body[:MOST_ANSWER_BYTES], type=Evidence)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AttestationError(f"the answer is no evidence: {one_line(error)}") from None
    if evidence.format != FORMAT:
        raise AttestationError(f"the evidence is of format {evidence.format}: only {FORMAT} is known")
    return evidence


def _quote_bytes(evidence: Evidence) -> bytes:
    try:
        return base64.b64decode(evidence.quote, validate=True)
    except ValueError:
        raise AttestationError("the evidence holds no quote") from None


def _save(file: Path, certificate: bytes) -> None:
    try:
        file.write_text(ssl.DER_cert_to_PEM_cert(certificate))
    except OSError as error:
        raise BadInputError(f"cannot write {file}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
