"""The TEE side as an enclave's process, with all that Gramine forbids made to fail: it answers over its service.

And what would need the forbidden is caught: each of the shim's rules has a call that runs into it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asynctsqp import verify
from tests.conftest import ROOT, GpuProcess
from tests.processes import assert_one_error, run_main
from tests.quotes import MRENCLAVE, pseudo_files, sgx_quote

NAME = "/asynctsqp-shim"
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the numbers of system calls in the shim are those of x86-64"
)
QUESTION = "What is the capital of France?"
ENCLAVE = ["--enclave", "--protect", "full", "--kv-memory", "64M", "--mask-memory", "64M", "--threads", "1"]
POLICY = f'[sgx]\nmrenclave = ["{MRENCLAVE.hex()}"]\n[configuration]\nprotect = "full"\nenclave = true\n'


@dataclass
class Enclave:
    """The process, where it serves, and what it was refused."""

    process: subprocess.Popen[str]
    url: str
    report: Path
    sealed: Path
    lines: list[str]

    @property
    def refused(self) -> list[str]:
        return self.report.read_text().splitlines() if self.report.exists() else []


@contextlib.contextmanager
def enclave(model: Path, gpu: str, directory: Path, *flags: str) -> Iterator[Enclave]:
    sealed, report = directory / "sealed", directory / "report"
    sealed.mkdir(exist_ok=True)
    files = ["--tls-cert", str(sealed / "certificate.pem"), "--tls-key", str(sealed / "key.pem")]
    command = [sys.executable, "-m", "tests.gramine_shim", str(report), str(sealed), str(directory / "attestation")]
    command += ["--", "--model", str(model), "--gpu", gpu, "--serve", "127.0.0.1:0", *ENCLAVE, *files, *flags]
    environment = os.environ | {"UV_USE_IO_URING": "0", "MALLOC_ARENA_MAX": "1", "TMPDIR": str(sealed)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(sealed / "torchinductor")
    # scikit-learn, of the dev extra, tries a semaphore out when it is imported, as it is by transformers 5.17
    environment["JOBLIB_MULTIPROCESSING"] = "0"
    with pseudo_files(directory / "attestation", sgx_quote):
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT, text=True, env=environment)
        lines: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        listener = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        listener.start()
        try:
            word, _, url = process.stdout.readline().strip().partition(" ")
            if word != "serving":
                process.wait(20)
                listener.join()
                pytest.fail(f"it does not serve: {lines}")
            yield Enclave(process, url, report, sealed, lines)
        finally:
            process.terminate()
            process.wait(20)
            listener.join()
            process.stdout.close()
            process.stderr.close()


def ask(enclave: Enclave, pinned: Path) -> str:
    """The question, over a connection that trusts nothing but the key that was attested."""
    context = ssl.create_default_context(cafile=str(pinned))
    body = {"model": None, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "temperature": 0}
    with urllib.request.urlopen(f"{enclave.url}/v1/models", context=context, timeout=30) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(f"{enclave.url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text


def attested(enclave: Enclave, directory: Path) -> dict[str, Any]:
    """As a client does before it sends a prompt; keeps the certificate."""
    policy = directory / "policy.toml"
    policy.write_text(POLICY)
    flags = ("--policy", str(policy), "--insecure-skip-signature", "--save-certificate", str(directory / "pin.pem"))
    ended = run_main(verify.main, enclave.url, *flags)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_the_demo_prompt_is_answered_under_what_gramine_forbids(
    demo_model: Path,
    tiny_model: Callable[[str], Path],
    start_gpu: Callable[..., GpuProcess],
    tiny_gpu: GpuProcess,
    tmp_path: Path,
) -> None:
    gpu = start_gpu(demo_model)
    with enclave(demo_model, gpu.endpoint, tmp_path, "--transport", "shm", "--shm-name", NAME) as running:
        pid = running.process.pid
        found = attested(running, tmp_path)
        assert found["configuration"]["protect"] == "full"
        assert "Paris" in ask(running, tmp_path / "pin.pem")
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert f"/dev/shm{NAME}" in maps, "the named region is what the tensors go through"
        assert ".safetensors" not in maps, "the model is mapped"
        targets = {os.readlink(entry) for entry in _entries(Path(f"/proc/{pid}/fd"))}
        assert not [target for target in targets if "io_uring" in target]
        assert not Path(f"/proc/{pid}/task/{pid}/children").read_text().split(), "it has children"
        assert not _unix_sockets(pid)
        assert running.refused == []
        assert QUESTION not in "".join(running.lines)
    key = running.sealed / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert not any("Traceback" in line for line in running.lines)
    with enclave_again(tiny_model("gqa"), tiny_gpu, tmp_path) as running:  # the same key after a restart
        assert attested(running, tmp_path)["tls_key_sha256"] == found["tls_key_sha256"]


@contextlib.contextmanager
def enclave_again(model: Path, gpu: GpuProcess, directory: Path) -> Iterator[Enclave]:
    for file in (directory / "attestation").iterdir():
        file.unlink()
    (directory / "attestation").rmdir()
    with enclave(model, gpu.endpoint, directory, "--transport", "binary") as running:
        yield running


def _entries(directory: Path) -> Iterator[Path]:
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            os.readlink(entry)
            yield entry


def _unix_sockets(pid: int) -> list[str]:
    """Unix sockets of the process that have a name in the file system or elsewhere: those that others could reach."""
    targets = (os.readlink(entry) for entry in _entries(Path(f"/proc/{pid}/fd")))
    own = {target.removeprefix("socket:[").rstrip("]") for target in targets if target.startswith("socket:[")}
    lines = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    return [line for line in lines if (fields := line.split())[6] in own and len(fields) > 7]


RULES = {
    "a Unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/tmp/x')",
    "a process": "import subprocess; subprocess.run(['true'])",
    "a fork": "import os; os.fork() or os._exit(0)",
    "a semaphore": "import posix_ipc; posix_ipc.Semaphore('/x', posix_ipc.O_CREX)",
    "a lock between processes": "import multiprocessing as m; m.Lock()",
    "a file": "open('/var/tmp/asynctsqp-x', 'w')",
    "a folder": "import os; os.mkdir('/var/tmp/asynctsqp-x')",
    "a ring": "import ctypes; ctypes.CDLL(None, use_errno=True).syscall(425, 8, 0) < 0 and fail()",
    "a process in C": "import ctypes; ctypes.CDLL(None, use_errno=True).syscall(57) < 0 and fail()",
    "a mapped model": "import mmap; f = open('{model}/model.safetensors'); mmap.mmap(f.fileno(), 4096, prot=1)",
}


@pytest.mark.parametrize("name", RULES)
def test_the_shim_forbids_what_it_says(name: str, demo_model: Path, tmp_path: Path) -> None:
    call = RULES[name].format(model=demo_model)
    script = (
        "import sys\nfrom tests import gramine_shim\nfrom asynctsqp import tee\n"
        "def fail():\n    import ctypes, os\n    why = os.strerror(ctypes.get_errno())\n"
        "    print('Gramine has no', why, file=sys.stderr)\n    sys.exit(1)\n"
        f"tee.main = lambda: exec({call!r}, {{'fail': fail}}) or 0\n"
        f"sys.argv = ['shim', {str(tmp_path / 'report')!r}, {str(tmp_path)!r}, {str(tmp_path)!r}, '--']\n"
        "sys.exit(gramine_shim.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert "Gramine has no" in done.stderr
    assert (tmp_path / "report").read_text() or "not implemented" in done.stderr


def test_an_enclave_that_cannot_be_attested_says_so(tiny_model: Any, tiny_gpu: GpuProcess, tmp_path: Path) -> None:
    """And serves all the same: whether that is good enough is the client's decision."""
    flags = ("--transport", "binary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "pseudo_files", _nothing)
        with enclave(tiny_model("gqa"), tiny_gpu.endpoint, tmp_path, *flags) as running:
            policy = tmp_path / "policy.toml"
            policy.write_text(POLICY)
            ended = run_main(verify.main, running.url, "--policy", str(policy), "--insecure-skip-signature")
            assert_one_error(ended, 5, "404", program="asynctsqp.verify")
    assert any("nothing here makes quotes" in line for line in running.lines)


@contextlib.contextmanager
def _nothing(*_: Any) -> Iterator[None]:
    yield
