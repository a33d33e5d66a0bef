"""How the service is started: addresses, keys, certificates, what is refused, and what a quote is about."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from asynctsqp import BadInputError, Engine
from asynctsqp.config import EngineOptions
from asynctsqp.service.attestation import Binding
from asynctsqp.service.keys import ApiKeys
from asynctsqp.service.options import Address, ServiceOptions
from asynctsqp.service.server import Door
from asynctsqp.service.tls import Identity
from tests.processes import assert_one_error, run_tee
from tests.services import assert_error, served, service_process

Connect = Callable[..., Engine]
NONCE = bytes(range(32))
REFUSED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--serve", "8000"), ("HOST:PORT",)),
    (("--serve", "::1:8000"), ("HOST:PORT",)),
    (("--serve", "127.0.0.1:99999"), ("HOST:PORT",)),
    (("--serve", "no.such.host.invalid:1"), ("no.such.host.invalid",)),
    (("--serve", "0.0.0.0:0"), ("--api-keys",)),
    (("--serve", "[::]:0"), ("--api-keys",)),
    (("--serve", "0.0.0.0:0", "--api-keys", "KEYS", "--tls", "off"), ("--tls off",)),
    (("--serve", "127.0.0.1:0", "--api-keys", "/does/not/exist"), ("--api-keys", "No such file")),
    (("--serve", "127.0.0.1:0", "--api-keys", "EMPTY"), ("no key",)),
    (("--serve", "127.0.0.1:0", "--tls-cert", "EMPTY"), ("--tls-key",)),
    (("--serve", "127.0.0.1:0", "--tls-cert", "EMPTY", "--tls-key", "EMPTY"), ("cannot be used",)),
    (("--serve", "127.0.0.1:0", "--tls-name", "name"), ("--tls-name", "--tls on")),
    (("--serve", "127.0.0.1:0", "--tls", "on", "--tls-name", "no name"), ("--tls-name", "DNS")),
    (("--serve", "127.0.0.1:0", "--prompt", "Hello"), ("--prompt",)),
    (("--serve", "127.0.0.1:0", "--json"), ("--json",)),
    (("--serve", "127.0.0.1:0", "--stats"), ("/metrics",)),
    (("--serve", "127.0.0.1:0", "--max-requests", "0"), ("--max-requests",)),
    (("--serve", "127.0.0.1:0", "--loop", "other"), ("--loop",)),
    (("--api-keys", "KEYS", "--prompt", "Hello"), ("--serve",)),
    (("--tls", "on", "--prompt", "Hello"), ("--serve",)),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED, ids=lambda value: " ".join(value))
def test_what_cannot_be_served_is_one_line(
    flags: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    (tmp_path / "KEYS").write_text("key\n")
    (tmp_path / "EMPTY").write_text("# nothing\n")
    flags = tuple(str(tmp_path / flag) if flag in ("KEYS", "EMPTY") else flag for flag in flags)
    ended = run_tee("--model", str(tiny_model("gqa")), *flags)
    if "--loop" in flags:  # argparse's own error
        assert ended.code == 2
        assert "--loop" in ended.err
    else:
        ended_without_warning = [line for line in ended.errors if ": warning: " not in line]
        assert_one_error(type(ended)(ended.code, ended.out, "\n".join(ended_without_warning)), 2, *words)
    assert ended.out == ""


def test_a_port_that_is_taken(tiny_model: Callable[[str], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run_tee("--model", str(tiny_model("gqa")), "--serve", where)
    assert_one_error(ended, 2, "cannot listen", "in use")


def test_a_missing_dependency(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    ended = run_tee("--model", str(tiny_model("gqa")), "--serve", "127.0.0.1:0")
    assert_one_error(ended, 2, "uvicorn", "asynctsqp[serve]")


@pytest.mark.parametrize(
    ("text", "host", "loopback"),
    [
        ("127.0.0.1:0", "127.0.0.1", True),
        ("127.9.9.9:80", "127.9.9.9", True),
        ("localhost:8000", "localhost", True),
        ("[::1]:8000", "::1", True),
        ("0.0.0.0:1", "0.0.0.0", False),
        ("[::]:1", "::", False),
    ],
)
def test_addresses(text: str, host: str, loopback: bool) -> None:
    address = Address.parse(text)
    assert (address.host, address.loopback) == (host, loopback)
    assert address.url(5, tls=True) == f"https://{'[' + host + ']' if ':' in host else host}:5"


def test_an_ipv6_service_with_a_certificate_of_ones_own(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """Made by openssl, as an operator would."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:::1")
    command = ["openssl", *made.split(), *names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--threads", "1")
    with service_process(tiny_model("gqa"), *flags, serve="[::1]:0") as service:
        assert service.url.startswith("https://[::1]:")
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=service.url, verify=context) as client:
            assert client.get("/health").json() == {"status": "ok"}
            assert_error(client.get("/attestation"), 404, "no_evidence")


def keys_in(path: Path, text: str) -> ApiKeys:
    path.write_text(text)
    return ApiKeys.read(path)


def test_keys(tmp_path: Path) -> None:
    keys = keys_in(tmp_path / "keys", "# comment\n\n  first  \nsecond\n")
    for allowed in ("Bearer first", "bearer second", "BEARER  first "):
        assert keys.allow(allowed)
    for refused in (
        None,
        "",
        "first",
        "Bearer",
        "Bearer ",
        "Bearer firs",
        "Bearer firstx",
        "Basic first",
        "Bearer # comment",
    ):
        assert not keys.allow(refused)
    assert not keys.allow("Bearer \u00e9"), "what is not ASCII is no error"
    for text in ("", "# only\n", "two words\n", "\u00e9\n"):
        with pytest.raises(BadInputError):
            keys_in(tmp_path / "bad", text)


def test_every_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In constant time each, and none is left out after a hit."""
    import hmac

    compared: list[int] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(b)) or compare(a, b))
    keys = keys_in(tmp_path / "keys", "first\nsecond-which-is-longer\nthird\n")
    assert keys.allow("Bearer first")
    assert compared == [32, 32, 32]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_of_keys_that_others_can_read(
    mode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], connect: Connect
) -> None:
    path = tmp_path / "keys"
    path.write_text("key\n")
    path.chmod(mode)
    Door(Address.parse("127.0.0.1:0"), ServiceOptions(api_keys=str(path)), connect().options).close()
    assert ("others can read" in capsys.readouterr().err) == (mode == 0o644)


def test_a_key_made_at_start_is_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenSSL is given through a file is encrypted, readable by us alone, and gone afterwards."""
    seen: list[tuple[Path, int, str]] = []
    load = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, certificate: Path, key: Path, password: bytes) -> None:
        seen.append((Path(key), stat.S_IMODE(Path(key).stat().st_mode), Path(key).read_text()))
        load(context, certificate, key, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    first, second = Identity.make(["localhost", "127.0.0.1"]), Identity.make(["localhost"])
    assert first.key_hash != second.key_hash
    for path, mode, text in seen:
        assert mode == 0o600
        assert "ENCRYPTED PRIVATE KEY" in text
        assert "BEGIN PRIVATE KEY" not in text
        assert "EC PRIVATE KEY" not in text
        assert not path.exists()


def test_the_printed_hashes_are_those_of_openssl(tmp_path: Path) -> None:
    identity = Identity.make(["localhost", "10.0.0.1", "::1"])
    from cryptography.hazmat.primitives.serialization import Encoding

    path = tmp_path / "cert.pem"
    path.write_bytes(identity.certificate.public_bytes(Encoding.PEM))

    def openssl(*command: str, given: bytes | None = None) -> bytes:
        return subprocess.run(["openssl", *command], input=given, capture_output=True, check=True).stdout

    fingerprint = (
        openssl("x509", "-in", str(path), "-noout", "-fingerprint", "-sha256").decode().strip().rpartition("=")[2]
    )
    public = openssl("x509", "-in", str(path), "-noout", "-pubkey")
    spki = hashlib.sha256(openssl("pkey", "-pubin", "-outform", "DER", given=public)).digest()
    certificate, key = identity.described()
    assert certificate.endswith(fingerprint.lower())
    assert spki.hex() in key
    assert base64.b64encode(spki).decode() in key
    names = openssl("x509", "-in", str(path), "-noout", "-ext", "subjectAltName").decode()
    assert "DNS:localhost, IP Address:10.0.0.1, IP Address:0:0:0:0:0:0:0:1" in names


class FakeEvidence:
    """Quotes what it was asked for."""

    async def quote(self, nonce: bytes) -> dict[str, Any]:
        return {"quote": "00" + nonce.hex()}


def test_a_quote_comes_with_what_it_is_about(connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine, served(engine, evidence=FakeEvidence()) as service:
            answer = (await service.client.get("/attestation", params={"nonce": NONCE.hex()})).json()
            assert answer["nonce"] == NONCE.hex()
            assert answer["quote"] == "00" + NONCE.hex()
            assert answer["configuration"]["protect"] == "none"
            assert answer["configuration"]["mask_peer_key"] == ""
            assert answer["configuration"]["model"] == engine.fingerprint.hex()
            text = httpx.Response(200, json=dict(sorted(answer["configuration"].items()))).text
            assert hashlib.sha256(text.encode()).hexdigest() == answer["configuration_sha256"]
            assert answer["configuration_sha256"] == service.door.binding(engine).configuration_hash.hex()
            for nonce in (None, "", "zz", "00" * 15, "00" * 65):
                refused = await service.client.get("/attestation", params={} if nonce is None else {"nonce": nonce})
                assert_error(refused, 400, "invalid_value", "nonce")
        async with connect(partition="fused") as engine, served(engine) as service:
            assert_error(await service.client.get("/attestation"), 404, "no_evidence")
            other = service.door.binding(engine)
            assert other.configuration_hash.hex() != answer["configuration_sha256"]

    asyncio.run(run())


def test_the_binding_is_about_the_key_of_the_connection(connect: Connect) -> None:
    async def run() -> None:
        async with connect() as engine, served(engine) as service:
            assert service.door.binding(engine).key_hash == bytes(32), "without TLS"
            door = Door(Address.parse("127.0.0.1:0"), ServiceOptions(tls="on"), engine.options)
            assert door.identity is not None
            assert door.binding(engine).key_hash == door.identity.key_hash
            door.close()

    asyncio.run(run())


def test_a_quote_is_about_the_mask_peer_too() -> None:
    """Who makes the masks could read everything together with the GPU side."""
    key = "k" * 40
    options = EngineOptions(protect="full", mask_peer="tcp://peer.example:5556", mask_peer_key=key)
    binding = Binding.of(cast(Engine, SimpleNamespace(options=options, fingerprint=bytes(32))), None)
    assert binding.configuration["mask_peer_key"] == key
