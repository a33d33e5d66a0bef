"""Inside an enclave what would reach the host is refused, in one line, before anything is loaded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asynctsqp
from asynctsqp import enclave_mode
from asynctsqp.config import EngineOptions
from asynctsqp.shm import Region
from tests.conftest import ROOT
from tests.processes import assert_one_error, run_main

ENCLAVE = ("--enclave", "--protect", "full", "--kv-memory", "64M", "--mask-memory", "64M", "--threads", "1")
UNMASKED = ("--enclave", "--kv-memory", "64M", "--threads", "1")
SHARED = ("--shm-name", "/asynctsqp-enclave")
GPU = ("--gpu", "tcp://127.0.0.1:1")
SERVE = ("--serve", "127.0.0.1:0")

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no service": ((*ENCLAVE, *SHARED, *GPU), "--serve"),
    "a prompt": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--prompt", "secret"), "--prompt"),
    "a file": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--prompt-file", "/etc/hostname"), "--prompt-file"),
    "a chat": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--chat"), "--chat"),
    "an answer in JSON": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--json"), "--json"),
    "a local GPU side": ((*ENCLAVE, *SHARED, *SERVE), "--gpu"),
    "a Unix socket": ((*ENCLAVE, *SHARED, *SERVE, "--gpu", "ipc:///tmp/x"), "tcp://"),
    "protect none": ((*UNMASKED, *SHARED, *GPU, *SERVE), enclave_mode.FORCE),
    "protect verify": ((*UNMASKED, *SHARED, *GPU, *SERVE, "--protect", "verify"), enclave_mode.FORCE),
    "another partition": ((*UNMASKED, *SHARED, *GPU, *SERVE, "--partition", "fused"), enclave_mode.FORCE),
    "statistics": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--stats"), "--stats"),
    "a log of calls": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--log-rpc", "/tmp/x"), "--log-rpc"),
    "a trace": ((*ENCLAVE, *SHARED, *GPU, *SERVE, "--trace", "/tmp/x"), "--trace"),
    "a region of any name": ((*ENCLAVE, *GPU, *SERVE), "--shm-name"),
    "no size of keys": ((*ENCLAVE[:3], "--threads", "1", *SHARED, *GPU, *SERVE), "--kv-memory"),
    "no size of masks": ((*ENCLAVE[:5], "--threads", "1", *SHARED, *GPU, *SERVE), "--mask-memory"),
    "no number of threads": ((*ENCLAVE[:7], *SHARED, *GPU, *SERVE), "--threads"),
    "a mask peer on the same host": (
        (*ENCLAVE, *SHARED, *GPU, *SERVE, "--mask-peer", "tcp://localhost:2", "--mask-peer-key", "k" * 40),
        "one host",
    ),
    "the forcing flag alone": (("--enclave-unprotected-activations",), "--enclave"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reaches_the_host_is_refused(name: str) -> None:
    flags, word = REFUSED[name]
    assert_one_error(run_tee_hushed(*flags), 2, word)


def run_tee_hushed(*flags: str) -> Any:
    """main() in this process; what `hush` sets is not for the tests that follow."""
    from asynctsqp.tee import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enclave_mode, "hush", lambda: None)
        return run_main(main, "--model", "/nowhere", *flags)


@pytest.mark.parametrize("options", [{"protect": "none"}, {"protect": "none", "partition": "fused"}])
def test_what_shows_activations_can_be_forced(options: dict[str, Any]) -> None:
    """The twin: with the flag that says what it does, and with nothing else changed."""
    given = options | {"enclave": True, "transport": "binary", "kv_memory": "64M", "threads": 1}
    with pytest.raises(asynctsqp.BadInputError, match="recovered"):
        EngineOptions(**given)
    assert EngineOptions(**given, enclave_unprotected_activations=True).enclave


def test_the_api_keeps_the_same_rules() -> None:
    good = {"enclave": True, "transport": "binary", "kv_memory": "64M", "threads": 1}
    good |= {"protect": "full", "mask_memory": "64M"}
    with pytest.raises(asynctsqp.BadInputError, match="--gpu"):
        asynctsqp.Engine.launch("x", **good)
    with pytest.raises(asynctsqp.BadInputError, match="tcp://"):
        asynctsqp.Engine.connect("x", "ipc:///tmp/x", **good)
    asynctsqp.Engine.connect("x", "tcp://127.0.0.1:1", **good)
    peer = {"mask_peer": "tcp://peer.example:2", "mask_peer_key": "k" * 40}
    asynctsqp.Engine.connect("x", "tcp://127.0.0.1:1", **good, **peer)
    with pytest.raises(asynctsqp.BadInputError, match="one host"):
        asynctsqp.Engine.connect("x", "tcp://peer.example:1", **good, **peer)


def test_pseudo_files_imply_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not enclave_mode.implied(tmp_path / "attestation")
    (tmp_path / "attestation").mkdir()
    assert enclave_mode.implied(tmp_path / "attestation")
    monkeypatch.setattr(enclave_mode, "implied", lambda: True)
    assert_one_error(run_tee_hushed(*ENCLAVE[1:], *SHARED, *GPU, "--prompt", "secret"), 2, "--serve")
    with pytest.raises(asynctsqp.BadInputError, match=enclave_mode.FORCE):
        asynctsqp.Engine.connect("x", "tcp://127.0.0.1:1")
    assert not asynctsqp.Engine.connect("x", "tcp://127.0.0.1:1", enclave=False).options.enclave


FAILING = {
    "the main thread": "[][len('my secret prompt')]",
    "another thread": "threading_failure()",
    "the event loop": "loop_failure()",
}
HELPERS = """
import asyncio, logging, threading, warnings

def threading_failure():
    thread = threading.Thread(target=lambda: int("my secret prompt"))
    thread.start()
    thread.join()

def loop_failure():
    async def run():
        async def fail():
            raise ValueError("my secret prompt")
        asyncio.get_running_loop().create_task(fail())
        warnings.warn("my secret prompt")
        logging.getLogger("uvicorn.error").error("my secret prompt")
        await asyncio.sleep(0.1)
    asyncio.run(run())
"""


@pytest.mark.parametrize("enclave", [True, False])
@pytest.mark.parametrize("name", FAILING)
def test_an_unforeseen_error_says_its_class_only(name: str, enclave: bool) -> None:
    """And outside an enclave it says what it always did: that the test would see a secret."""
    prelude = "" if not enclave else "from asynctsqp import enclave_mode\nenclave_mode.hush()\n"
    script = HELPERS + prelude + f"{FAILING[name]}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ("secret" in done.stderr or "Traceback" in done.stderr) == (not enclave), done.stderr
    if enclave and name != "the event loop":
        (line,) = done.stderr.splitlines()
        assert line.endswith("of which an enclave says no more")


def test_no_core_is_dumped() -> None:
    script = (
        "import resource, ctypes\nfrom asynctsqp import enclave_mode\nenclave_mode.hush()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "(0, 0) 0"


def test_a_file_system_that_cannot_reserve_is_grown_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gramine's shared memory; a full one is an error all the same."""

    def refuse(error: int) -> Any:
        def posix_fallocate(*_: int) -> None:
            raise OSError(error, os.strerror(error))

        return posix_fallocate

    monkeypatch.setattr(os, "posix_fallocate", refuse(95))
    region = Region.create(None, 1, 2, 4096)
    region.unlink()
    assert len(region.memory) > 4 * 4096
    region.close()
    monkeypatch.setattr(os, "posix_fallocate", refuse(28))
    with pytest.raises(asynctsqp.BadInputError, match="no room"):
        Region.create(None, 1, 2, 4096)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_engine_runs_on_either_loop(loop: str, connect: Callable[..., asynctsqp.Engine]) -> None:
    """Gramine emulates epoll, on which uvloop is built: there is a way without."""

    async def run() -> tuple[str, int]:
        async with connect(loop=loop) as engine:
            done = await engine.complete([1, 2, 3], max_new_tokens=3, temperature=0, ignore_eos=True)
            assert engine._thread is not None
            return type(engine._thread._loop).__module__, len(done.token_ids)

    module, tokens = asyncio.run(run())
    assert module.startswith("uvloop") == (loop == "uvloop")
    assert tokens == 3
