"""Quotes: asked for through files as Gramine and the kernel offer them, read, and held against a policy."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asynctsqp.attestation import evidence
from asynctsqp.attestation.evidence import Attestation, GramineQuoter, TsmQuoter, canonical, quoter, report_data
from asynctsqp.attestation.policy import Policy
from asynctsqp.attestation.quote import Quote, SgxReport, TdxReport
from asynctsqp.errors import AttestationError, BadInputError
from tests import quotes
from tests.quotes import MRENCLAVE, MRSIGNER, MRTD, RTMR, pseudo_files, sgx_quote, tdx_quote

DATA = bytes(range(64))
KEY_HASH = b"k" * 32
CONFIGURATION = {"protect": "full", "model": "ab" * 32, "lanes": None}
NONCE = b"n" * 32


def test_what_a_quote_is_about() -> None:
    """The formula, written down a second time."""
    text = '{"lanes":null,"model":"' + "ab" * 32 + '","protect":"full"}'
    assert canonical(CONFIGURATION) == text.encode()
    sha = lambda data: hashlib.sha256(data).digest()  # noqa: E731
    bound = sha(b"asynctsqp attestation 1" + KEY_HASH + sha(text.encode()))
    assert report_data(KEY_HASH, CONFIGURATION, NONCE) == bound + sha(NONCE)


@pytest.mark.parametrize("nonce", [b"", b"n" * 15, b"n" * 65])
def test_a_nonce_of_another_length_is_refused(nonce: bytes) -> None:
    with pytest.raises(AttestationError, match="nonce"):
        report_data(KEY_HASH, CONFIGURATION, nonce)


def test_gramine_is_asked_through_its_files(tmp_path: Path) -> None:
    """Many at once: each gets the quote of its own nonce."""

    async def ask(directory: Path) -> list[dict[str, Any]]:
        attestation = Attestation(GramineQuoter(directory), KEY_HASH, CONFIGURATION)
        return await asyncio.gather(*[attestation.quote(bytes([number]) * 32) for number in range(20)])

    with pseudo_files(tmp_path / "attestation", sgx_quote) as directory:
        answers = asyncio.run(ask(directory))
    for number, answer in enumerate(answers):
        quote = Quote.parse(base64.b64decode(json.loads(json.dumps(answer))["quote"]))
        assert quote.report.report_data == report_data(KEY_HASH, CONFIGURATION, bytes([number]) * 32)
        assert set(answer) == {"format", "quote"}


@pytest.mark.parametrize("kind", [b"none", b"epid\n", b"\xff\xfe"])
def test_an_enclave_without_dcap_says_so(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "attestation_type").write_bytes(kind)
    with pytest.raises(AttestationError, match=r"sgx\.remote_attestation"):
        GramineQuoter(tmp_path)


@pytest.mark.parametrize("missing", ["attestation_type", "user_report_data", "quote"])
def test_a_file_that_is_not_there_is_one_error(missing: str, tmp_path: Path) -> None:
    (tmp_path / "attestation_type").write_bytes(b"dcap")
    for name in ("user_report_data", "quote"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / missing).unlink()
    with pytest.raises(AttestationError, match=missing):
        GramineQuoter(tmp_path).quote(DATA)
    assert not (tmp_path / missing).exists(), "a file of the host's making would be an enclave's quote"


def test_an_empty_quote_and_one_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "attestation_type").write_bytes(b"dcap")
    (tmp_path / "user_report_data").write_bytes(b"")
    for quote in (b"", bytes(1 << 20)):
        (tmp_path / "quote").write_bytes(quote)
        with pytest.raises(AttestationError, match="bytes"):
            GramineQuoter(tmp_path).quote(DATA)


def test_a_tdx_guest_is_asked_through_configfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for each quote, whose files come and go with it, as the kernel does it."""

    def mkdir(report: Path) -> None:
        os.mkdir(report)
        (report / "inblob").write_bytes(b"")
        (report / "outblob").write_bytes(tdx_quote(DATA))

    written: list[bytes] = []

    def rmdir(report: Path) -> None:
        written.append((report / "inblob").read_bytes())
        shutil.rmtree(report)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    assert Quote.parse(TsmQuoter(tmp_path).quote(DATA)).report.report_data == DATA
    assert written == [DATA]
    assert not list(tmp_path.iterdir()), "the report's directory is removed"


def test_the_machine_is_recognised_by_its_files(tmp_path: Path) -> None:
    gramine, tsm = tmp_path / "attestation", tmp_path / "report"
    with pytest.raises(AttestationError, match="nothing here makes quotes"):
        quoter(gramine, tsm)
    tsm.mkdir()
    assert isinstance(quoter(gramine, tsm), TsmQuoter)
    gramine.mkdir()
    (gramine / "attestation_type").write_bytes(b"dcap\n")
    assert isinstance(quoter(gramine, tsm), GramineQuoter)


@pytest.mark.parametrize("version", [3, 4])
def test_an_sgx_quote_is_read(version: int) -> None:
    quote = Quote.parse(sgx_quote(DATA, version))
    assert quote.version == version
    assert quote.report == SgxReport(MRENCLAVE, MRSIGNER, quotes.PROD_ID, quotes.SVN, False, DATA)
    assert Quote.parse(sgx_quote(DATA, version, flags=0b111)).report.debug


def test_a_tdx_quote_is_read() -> None:
    assert Quote.parse(tdx_quote(DATA)).report == TdxReport(MRTD, RTMR, False, DATA)
    assert Quote.parse(tdx_quote(DATA, attributes=1)).report.debug
    assert not Quote.parse(tdx_quote(DATA, attributes=1 << 28)).report.debug  # SEPT_VE_DISABLE


@pytest.mark.parametrize("make", [sgx_quote, tdx_quote])
def test_a_library_of_others_reads_the_same(make: Callable[[bytes], bytes]) -> None:
    """That the offsets here and there are Intel's, and not only each other's."""
    library = pytest.importorskip("dcap_qvl", reason="dcap-qvl is not installed")
    theirs, ours = library.parse_quote(make(DATA)).report, Quote.parse(make(DATA)).report
    assert bytes(theirs.report_data) == ours.report_data == DATA
    if isinstance(ours, SgxReport):
        assert (bytes(theirs.mr_enclave), bytes(theirs.mr_signer)) == (ours.mr_enclave, ours.mr_signer)
    else:
        assert (bytes(theirs.mr_td), bytes(theirs.rt_mr3)) == (ours.mr_td, ours.rtmrs[3])


@pytest.mark.parametrize("make", [sgx_quote, tdx_quote])
def test_a_quote_that_is_cut_or_extended_is_refused(make: Callable[[bytes], bytes]) -> None:
    whole = make(DATA)
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"x", whole * 2]:
        with pytest.raises(AttestationError):
            Quote.parse(damaged)


def test_other_kinds_of_quotes_are_refused() -> None:
    body = bytes(quotes.TDX_BYTES)
    kinds = [(2, 0, 2), (5, 0, 2), (3, 0x81, 2), (4, 1, 2), (3, 0, 3), (0, 0, 0), (0xFFFF, 0xFFFFFFFF, 0xFFFF)]
    for version, tee_type, key_type in kinds:
        with pytest.raises(AttestationError):
            Quote.parse(quotes.signed(quotes.header(version, tee_type, key_type) + body))


def test_any_bytes_are_a_quote_or_an_error() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    whole = bytearray(sgx_quote(DATA))
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(generator.randrange(1, 8)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        with contextlib.suppress(AttestationError):
            Quote.parse(bytes(damaged))


POLICY = {
    "by measurement": f'[sgx]\nmrenclave = ["{MRENCLAVE.hex()}"]\n',
    "by signer": f'[sgx]\nmrsigner = "{MRSIGNER.hex().upper()}"\nisv_prod_id = 7\nmin_isv_svn = 2\n',
}
TDX_POLICY = f'[tdx]\nmrtd = ["{MRTD.hex()}"]\nrtmrs = ["", "{RTMR[1].hex()}", "{RTMR[2].hex()}"]\n'


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Policy]:
    def read(text: str) -> Policy:
        file = tmp_path / "policy.toml"
        file.write_text(text)
        return Policy.read(file)

    return read


@pytest.mark.parametrize("name", POLICY)
def test_the_right_enclave_passes_and_others_do_not(name: str, policy: Callable[[str], Policy]) -> None:
    rules = policy(POLICY[name])
    rules.check(Quote.parse(sgx_quote(DATA)))
    twins: dict[str, dict[str, Any]] = {
        "by measurement": {"mrenclave": bytes(32)},
        "by signer": {"mrsigner": bytes(32)},
    }
    others = [twins[name], {"flags": 0b111}]
    others += [{"prod_id": 8}, {"svn": 1}] if name == "by signer" else []
    for other in others:
        with pytest.raises(AttestationError):
            rules.check(Quote.parse(sgx_quote(DATA, **other)))
    with pytest.raises(AttestationError, match="no \\[tdx\\]"):
        rules.check(Quote.parse(tdx_quote(DATA)))


def test_the_right_guest_passes_and_others_do_not(policy: Callable[[str], Policy]) -> None:
    rules = policy(TDX_POLICY)
    rules.check(Quote.parse(tdx_quote(DATA)))
    rules.check(Quote.parse(tdx_quote(DATA, rtmrs=(bytes(48), RTMR[1], RTMR[2], bytes(48)))))
    swapped = (RTMR[1], RTMR[0], RTMR[2], RTMR[3])
    for other in [{"mrtd": bytes(48)}, {"rtmrs": swapped}, {"attributes": 1}]:
        with pytest.raises(AttestationError):
            rules.check(Quote.parse(tdx_quote(DATA, **other)))  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match="no \\[sgx\\]"):
        rules.check(Quote.parse(sgx_quote(DATA)))


def test_debug_passes_only_where_the_policy_says_so(policy: Callable[[str], Policy]) -> None:
    policy(POLICY["by measurement"] + "allow_debug = true\n").check(Quote.parse(sgx_quote(DATA, flags=0b111)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[sgx]\n",
        "[sgx\n",
        '[sgx]\nmrenclave = ["12"]\n',
        '[sgx]\nmrenclave = ["' + "zz" * 32 + '"]\n',
        f'[sgx]\nmrsigner = "{MRSIGNER.hex()}"\n',
        f'[sgx]\nmrsigner = "{MRSIGNER.hex()}"\nisv_prod_id = 7\n',
        POLICY["by measurement"] + "mr_enclave = 1\n",
        POLICY["by measurement"] + "[unknown]\n",
        "[tdx]\nmrtd = []\n",
        "[tdx]\n",
        f'[tdx]\nmrtd = ["{MRTD.hex()}"]\n',
        f'[tdx]\nmrtd = ["{MRTD.hex()}"]\nrtmrs = ["{RTMR[0].hex()}", "{RTMR[1].hex()}"]\n',
        f'[tdx]\nmrtd = ["{MRTD.hex()}"]\nrtmrs = ["{RTMR[0].hex()}", "{RTMR[1].hex()}", ""]\n',
        '[configuration]\nprotect = "full"\n',
    ],
)
def test_a_policy_that_is_damaged_or_trusts_everybody_is_refused(text: str, policy: Callable[[str], Policy]) -> None:
    with pytest.raises(BadInputError) as caught:
        policy(text)
    assert str(caught.value).isprintable()


def test_the_configuration_is_held_to_the_policy(policy: Callable[[str], Policy]) -> None:
    rules = policy(POLICY["by measurement"] + f'[configuration]\nprotect = "full"\nmodel = "{"ab" * 32}"\n')
    rules.check_configuration(CONFIGURATION)
    for other in [
        {"protect": "none", "model": "ab" * 32},
        {"model": "ab" * 32},
        {"protect": "full", "model": "cd" * 32},
        {"protect": {"deep": "full\n"}, "model": "ab" * 32},
    ]:
        with pytest.raises(AttestationError, match="policy asks for"):
            rules.check_configuration(other)


def test_a_mask_peer_has_to_be_named_by_the_policy(policy: Callable[[str], Policy]) -> None:
    """Whoever runs it could read everything together with the GPU side."""
    key = "k" * 40
    silent = policy(POLICY["by measurement"])
    silent.check_configuration(CONFIGURATION | {"mask_peer_key": ""})
    with pytest.raises(AttestationError, match="mask peer"):
        silent.check_configuration(CONFIGURATION | {"mask_peer_key": key})
    naming = policy(POLICY["by measurement"] + f'[configuration]\nmask_peer_key = "{key}"\n')
    naming.check_configuration(CONFIGURATION | {"mask_peer_key": key})
    for other in ("", "l" * 40):
        with pytest.raises(AttestationError, match="policy asks for"):
            naming.check_configuration(CONFIGURATION | {"mask_peer_key": other})


def test_a_quote_whose_caller_has_left_mixes_with_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a cancelled caller is between writing its report data and reading its quote when another comes."""
    written: list[bytes] = []
    first, go_on = threading.Event(), threading.Event()

    def write(file: Path, data: bytes) -> None:
        written.append(data)

    def read(file: Path) -> bytes:
        if file.name == "attestation_type":
            return b"dcap"
        mine = len(written)
        if mine == 1:
            first.set()
            go_on.wait(10)
        return written[-1]

    monkeypatch.setattr(evidence, "_write", write)
    monkeypatch.setattr(evidence, "_read", read)
    attestation = Attestation(GramineQuoter(tmp_path), bytes(32), CONFIGURATION)

    async def test() -> None:
        leaving = asyncio.create_task(attestation.quote(bytes(16)))
        await asyncio.to_thread(first.wait, 10)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        staying = asyncio.create_task(attestation.quote(bytes(range(16))))
        await asyncio.sleep(0.1)
        assert len(written) == 1, "the second wrote its report data while the first had not read its quote"
        go_on.set()
        quote = base64.b64decode((await staying)["quote"])
        assert quote == report_data(bytes(32), CONFIGURATION, bytes(range(16)))

    asyncio.run(test())
