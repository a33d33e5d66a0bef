"""`python -m asynctsqp.verify` against a TLS server that shows evidence, true or not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import json
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from asynctsqp import verify
from asynctsqp.attestation import dcap
from asynctsqp.attestation.evidence import Attestation
from tests.processes import Ended, assert_one_error, run_main
from tests.quotes import MRENCLAVE, Make, sgx_quote

CONFIGURATION = {"model": "ab" * 32, "protect": "full", "partition": "shielded"}
POLICY = f'[sgx]\nmrenclave = ["{MRENCLAVE.hex()}"]\n[configuration]\nprotect = "full"\n'
SKIP = "--insecure-skip-signature"
Forge = Callable[[dict[str, Any]], Any]


@dataclass
class Key:
    """A key with a certificate that it signed itself, as the service makes one; in PEM, and what attestation binds."""

    file: Path
    hash: bytes


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Key]:
    return [make_key(tmp_path_factory.mktemp("keys") / "key.pem") for _ in range(2)]


def make_key(file: Path) -> Key:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asynctsqp")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.sign(private, hashes.SHA256())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Key(file, hashlib.sha256(public).digest())


class Fixed:
    """A quoting machine that makes what it is told to."""

    def __init__(self, make: Make) -> None:
        self.quote = make


@contextlib.contextmanager
def service(key: Key, attestation: Attestation | None, forge: Forge = lambda evidence: evidence) -> Iterator[str]:
    """Answers GET /attestation as the service does, on a TLS connection of its own key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonce = bytes.fromhex(parse_qs(urlsplit(self.path).query)["nonce"][0])
            if attestation is None:
                self.send_error(404, "no evidence here")
                return
            body = forge({"configuration": CONFIGURATION} | asyncio.run(attestation.quote(nonce)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key.file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    return file


def run_verify(url: str, policy: Path, *flags: str) -> Ended:
    return run_main(verify.main, url, "--policy", str(policy), *flags)


def good(key: Key, make: Make = sgx_quote) -> Attestation:
    return Attestation(Fixed(make), key.hash, CONFIGURATION)


def test_a_good_service_passes_all_but_the_signature(keys: list[Key], policy: Path, tmp_path: Path) -> None:
    pin = tmp_path / "pinned.pem"
    with service(keys[0], good(keys[0])) as url:
        ended = run_verify(url, policy, SKIP, "--save-certificate", str(pin))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["signature"] == "NOT CHECKED"
    assert "proves nothing" in ended.err
    assert found["configuration"] == CONFIGURATION
    assert found["tls_key_sha256"] == keys[0].hash.hex()
    assert base64.b64decode(found["pin"].removeprefix("sha256//")) == keys[0].hash
    shown = x509.load_pem_x509_certificate(pin.read_bytes())
    assert shown == x509.load_pem_x509_certificate(keys[0].file.read_bytes())


def replaced(**fields: Any) -> Forge:
    return lambda evidence: evidence | fields


FORGED: dict[str, Forge] = {
    "another configuration": replaced(configuration=CONFIGURATION | {"protect": "none"}),
    "no configuration": replaced(configuration=None),
    "no quote": replaced(quote=None),
    "a quote that is no base64": replaced(quote="%%%"),
    "a quote of nothing": replaced(quote=""),
    "another format": replaced(format=2),
    "a configuration in depth": replaced(configuration=CONFIGURATION | {"options": {"protect": "none"}}),
    "a number without end": replaced(configuration=CONFIGURATION | {"lanes": 10**400}),
    "no number": replaced(configuration=CONFIGURATION | {"lanes": float("nan")}),
    "half a character": replaced(configuration=CONFIGURATION | {"model": "\ud800"}),
    "a list": lambda evidence: [evidence],
    "no JSON": lambda evidence: b"\x00\xff",
    "deep JSON": lambda evidence: b"[" * 100_000,
    "an answer without end": lambda evidence: b" " * (2 << 20),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_evidence_is_refused(name: str, keys: list[Key], policy: Path) -> None:
    with service(keys[0], good(keys[0]), FORGED[name]) as url:
        assert_one_error(run_verify(url, policy, SKIP), 5, program="asynctsqp.verify")


def test_the_quote_of_another_key_is_refused(keys: list[Key], policy: Path) -> None:
    """A host between client and enclave, which has a TLS key of its own and passes the enclave's evidence on."""
    with service(keys[1], good(keys[0])) as url:
        ended = run_verify(url, policy, SKIP)
    assert_one_error(ended, 5, "connection's key", program="asynctsqp.verify")


def test_yesterdays_quote_is_refused(keys: list[Key], policy: Path) -> None:
    old = {"configuration": CONFIGURATION} | asyncio.run(good(keys[0]).quote(b"yesterday's nonce"))
    with service(keys[0], good(keys[0]), lambda _: old) as url:
        assert_one_error(run_verify(url, policy, SKIP), 5, "nonce", program="asynctsqp.verify")


def test_another_enclave_is_refused(keys: list[Key], policy: Path) -> None:
    with service(keys[0], good(keys[0], lambda data: sgx_quote(data, mrenclave=bytes(32)))) as url:
        assert_one_error(run_verify(url, policy, SKIP), 5, "mrenclave", program="asynctsqp.verify")


def test_a_service_without_evidence_is_one_error(keys: list[Key], policy: Path) -> None:
    with service(keys[0], None) as url:
        assert_one_error(run_verify(url, policy, SKIP), 5, "404", "no evidence here", program="asynctsqp.verify")


def test_a_service_s_own_refusal_is_read() -> None:
    body = json.dumps({"error": {"message": "not in\nan enclave", "type": "x", "param": None, "code": "no_evidence"}})
    assert verify._reason(body.encode()) == "not in an enclave"
    assert verify._reason(b"<html>\xff") == "<html>?"


def test_nobody_there_and_no_tls(policy: Path) -> None:
    assert_one_error(run_verify("https://127.0.0.1:1", policy, SKIP), 5, program="asynctsqp.verify")
    assert_one_error(run_verify("http://127.0.0.1:1", policy, SKIP), 2, "https", program="asynctsqp.verify")
    assert_one_error(run_verify("https://x", policy.parent / "none.toml", SKIP), 2, program="asynctsqp.verify")


def test_without_a_verifier_nothing_is_believed(keys: list[Key], policy: Path) -> None:
    with service(keys[0], good(keys[0])) as url, mock.patch.dict(sys.modules, {dcap.LIBRARY: None}):
        ended = run_verify(url, policy)
    assert_one_error(ended, 5, "pip install dcap-qvl", program="asynctsqp.verify")
    assert not ended.out


def library(status: str = "UpToDate", error: Exception | None = None) -> ModuleType:
    """As dcap-qvl: verify(quote, collateral, now) -> report."""
    seen = ModuleType(dcap.LIBRARY)

    def check(quote: bytes, collateral: str, now: int) -> SimpleNamespace:
        if error is not None:
            raise error
        assert quote[:2] == b"\x03\x00"
        assert collateral == "the collateral"
        assert now > 1_700_000_000
        return SimpleNamespace(status=status, advisory_ids=["INTEL-SA-00615"])

    seen.verify = check  # type: ignore[attr-defined]
    seen.QuoteCollateralV3 = SimpleNamespace(from_json=lambda text: text)  # type: ignore[attr-defined]
    return seen


@pytest.mark.parametrize(
    ("given", "code", "word"),
    [
        (library(), 0, "UpToDate"),
        (library("OutOfDate"), 5, "INTEL-SA-00615"),
        (library(error=ValueError("bad\nsignature")), 5, "not genuine"),
        (library(error=RuntimeError("x" * 10_000)), 5, "not genuine"),
    ],
)
def test_what_the_verifier_says_counts(
    given: ModuleType, code: int, word: str, keys: list[Key], policy: Path, tmp_path: Path
) -> None:
    collateral = tmp_path / "collateral.json"
    collateral.write_text("the collateral")
    with service(keys[0], good(keys[0])) as url, mock.patch.dict(sys.modules, {dcap.LIBRARY: given}):
        ended = run_verify(url, policy, "--collateral", str(collateral))
    assert ended.code == code, ended.err
    assert word in (ended.err if code else json.loads(ended.out)["signature"])
    assert code == 0 or not ended.out


def test_a_verifier_needs_collateral(keys: list[Key], policy: Path) -> None:
    with service(keys[0], good(keys[0])) as url, mock.patch.dict(sys.modules, {dcap.LIBRARY: library()}):
        assert_one_error(run_verify(url, policy), 5, "--collateral", program="asynctsqp.verify")
        missing = str(policy.parent / "missing.json")
        assert_one_error(run_verify(url, policy, "--collateral", missing), 2, program="asynctsqp.verify")


def test_the_real_verifier_refuses_a_quote_by_nobody(keys: list[Key], policy: Path, tmp_path: Path) -> None:
    pytest.importorskip("dcap_qvl", reason="dcap-qvl is not installed")
    collateral = tmp_path / "collateral.json"
    collateral.write_text("{}")
    with service(keys[0], good(keys[0])) as url:
        ended = run_verify(url, policy, "--collateral", str(collateral))
    assert_one_error(ended, 5, "collateral", program="asynctsqp.verify")
