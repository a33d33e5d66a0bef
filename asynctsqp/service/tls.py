"""The service's identity: a certificate of the operator's, or one for a key made at start.

Covered: a key made at start exists in this process's memory only; what OpenSSL reads through a file is encrypted under
a password that was never written. Not covered: a key of --tls-key, which is as safe as its file (in an enclave: on an
encrypted mount); that a client checks the fingerprint, or the quote that it is bound into, before it sends a prompt.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
import secrets
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asynctsqp.errors import BadInputError, one_line

VALID = datetime.timedelta(days=365)
_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
EARLIER = datetime.timedelta(hours=1)  # for clients whose clock is behind


@dataclass(frozen=True)
class Identity:
    """What a client can check us by, and the context that proves it."""

    context: ssl.SSLContext
    certificate: x509.Certificate

    @classmethod
    def make(cls, names: Sequence[str]) -> Identity:
        """A fresh P-256 key and a certificate signed with itself. names: DNS names and addresses of the service."""
        key, certificate = _new(names)
        password = secrets.token_hex(32).encode()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
        with tempfile.NamedTemporaryFile(prefix="asynctsqp-") as file:  # ssl reads files only
            file.write(certificate.public_bytes(Encoding.PEM) + pem)
            file.flush()
            return cls(_context(Path(file.name), Path(file.name), password), certificate)

    @classmethod
    def kept(cls, certificate: Path, key: Path, names: Sequence[str]) -> Identity:
        """The one in these files, which are made where there are none: on a mount that only this enclave can read."""
        if not key.exists() and not certificate.exists():
            _keep(certificate, key, names)
        return cls.read(certificate, key)

    @classmethod
    def read(cls, certificate: Path, key: Path) -> Identity:
        """Raises BadInputError for files that cannot be used."""
        context = _context(certificate, key, b"")  # an encrypted key must not ask for its password on a terminal
        return cls(context, x509.load_pem_x509_certificate(certificate.read_bytes()))

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate: 32 bytes."""
        return self.certificate.fingerprint(hashes.SHA256())

    @property
    def key_hash(self) -> bytes:
        """SHA-256 of the public key (SubjectPublicKeyInfo in DER, as RFC 7469 pins it): 32 bytes."""
        public = self.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(public).digest()

    def described(self) -> tuple[str, str]:
        """Two lines for people: the certificate, and the key in curl's form for --pinnedpubkey as well."""
        pin = base64.b64encode(self.key_hash).decode()
        return (
            f"TLS certificate SHA-256 {self.fingerprint.hex(':')}",
            f"TLS public key SHA-256 {self.key_hash.hex()} (sha256//{pin})",
        )


def _new(names: Sequence[str]) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    return key, _certificate(key, names)


def _keep(certificate_file: Path, key_file: Path, names: Sequence[str]) -> None:
    key, certificate = _new(names)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        for file, content in ((key_file, pem), (certificate_file, certificate.public_bytes(Encoding.PEM))):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as stream:
                stream.write(content)
    except OSError as error:
        raise BadInputError(f"cannot make {error.filename}: {error.strerror}") from None


def _context(certificate: Path, key: Path, password: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise BadInputError(f"--tls-cert {certificate}, --tls-key {key} cannot be used: {one_line(error)}") from None
    return context


def _certificate(key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asynctsqp")])
    now = datetime.datetime.now(datetime.UTC)
    public = key.public_key()
    usage = {"digital_signature": True, "content_commitment": False, "key_encipherment": False}
    usage |= {"data_encipherment": False, "key_agreement": False, "key_cert_sign": False, "crl_sign": False}
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in dict.fromkeys(names)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage, encipher_only=False, decipher_only=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if not _DNS_NAME.fullmatch(name):
        raise BadInputError(f"--tls-name {name[:120]!r} is neither a DNS name nor an address")
    return x509.DNSName(name)
