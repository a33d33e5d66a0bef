"""The enclave's manifest: rendered, parsed, and held to the policy that gramine/check.py also holds it to in make.

Where Gramine is installed its own gramine-manifest renders it too, by way of the Makefile.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import pytest

from asynctsqp import enclave_mode
from tests.conftest import ROOT

GRAMINE = ROOT / "gramine"
GPU = "tcp://127.0.0.1:5555"
MODELS = ["demo", "random:llama-3.2-1b", "random:tinyllama-1.1b"]
TRANSPORTS = ["shm", "binary"]
SIZE = {"enclave_size": "2048M", "max_threads": 24, "stack_size": "2M"}
PATHS = (Path(tomllib.__file__).parent.parent, Path(jinja2.__file__).parent.parent, ROOT)

Manifest = dict[str, Any]
Damage = Callable[[Manifest], None]


def load(name: str) -> ModuleType:
    """A script of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"gramine_{name}", GRAMINE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, variables = load("check"), load("variables")


@pytest.fixture
def render(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """render(model, transport, ...) -> the manifest, with the names that gramine-manifest brings stubbed."""

    def render(model: str = "demo", transport: str = "shm", **flags: Any) -> Manifest:
        monkeypatch.setattr(variables, "_enclave_size", lambda *_: json.dumps(SIZE))  # has its own tests: seconds
        settings = tomllib.loads((GRAMINE / "settings.toml").read_text())
        settings["arguments"]["transport"] = transport
        given = {"sgx": True, "edmm": False, "debug": False, "attestation": "dcap"} | flags
        values = variables.variables(settings, str(demo_model) if model == "demo" else model, GPU, **given)
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        template = environment.from_string((GRAMINE / "tee.manifest.template").read_text())
        names = {
            "gramine": SimpleNamespace(libos="/opt/gramine/libsysdb.so", runtimedir=lambda: "/opt/gramine/runtime"),
            "python": SimpleNamespace(get_sys_path=lambda interpreter: iter(PATHS)),
            "env": {},
        }
        return tomllib.loads(template.render(names | values))

    return render


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_template_renders_and_passes(model: str, transport: str, render: Callable[..., Manifest]) -> None:
    manifest = render(model, transport)
    assert list(check.faults(manifest)) == []
    argv = manifest["loader"]["argv"]
    assert argv[argv.index("--gpu") + 1] == GPU
    assert argv[argv.index("--model") + 1] == ("/model" if model == "demo" else model)
    shared = transport == "shm"
    assert manifest["sgx"]["allowed_files"] == (["dev:/dev/shm/asynctsqp-enclave"] if shared else [])
    kinds = [mount.get("type", "chroot") for mount in manifest["fs"]["mounts"]]
    assert kinds.count("untrusted_shm") == shared
    assert ("--shm-name" in argv) == shared


def test_an_editable_install_does_not_trust_the_whole_repository(render: Callable[..., Manifest]) -> None:
    manifest = render()
    uris = [mount.get("uri", "") for mount in manifest["fs"]["mounts"]] + manifest["sgx"]["trusted_files"]
    assert f"file:{ROOT}" not in [uri.rstrip("/") for uri in uris]
    assert f"file:{ROOT}/tee_side/" in manifest["sgx"]["trusted_files"]


def test_the_arguments_are_those_of_the_command(
    render: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's own parser takes them, in its enclave mode."""
    from asynctsqp.tee import _check, _parser

    argv = render()["loader"]["argv"]
    assert argv[1:3] == ["-m", "asynctsqp.tee"]
    arguments = _parser().parse_args(argv[3:])
    monkeypatch.setattr(enclave_mode, "hush", lambda: None)
    _check(arguments)
    assert arguments.options.enclave
    assert arguments.service.api_keys == "/app/api-keys"


@pytest.mark.parametrize("flags", [{"sgx": False, "attestation": "none"}, {"edmm": True}])
def test_the_switches(flags: dict[str, Any], render: Callable[..., Manifest]) -> None:
    manifest = render(**flags)
    assert list(check.faults(manifest)) == []
    assert manifest["sgx"]["edmm_enable"] is manifest["sgx"]["use_exinfo"] is flags.get("edmm", False)
    assert manifest["sgx"]["remote_attestation"] == flags.get("attestation", "dcap")
    kinds = {mount["path"]: mount.get("type") for mount in manifest["fs"]["mounts"]}
    assert kinds["/sealed"] == ("encrypted" if flags.get("sgx", True) else "tmpfs")


def test_a_debug_enclave_passes_only_where_it_was_asked_for(render: Callable[..., Manifest]) -> None:
    manifest = render(debug=True)
    assert list(check.faults(manifest, debug=True)) == []
    assert list(check.faults(manifest)) != []
    assert list(check.faults(render(), debug=True)) != []


def setting(name: str, value: Any) -> Damage:
    *tables, last = name.split(".")

    def damage(manifest: Manifest) -> None:
        table = manifest
        for part in tables:
            table = table.setdefault(part, {})
        table[last] = value

    return damage


def mount(**keys: str) -> Damage:
    return lambda manifest: manifest["fs"]["mounts"].append(keys)


FORBIDDEN: dict[str, Damage] = {
    "arguments from the host": setting("loader.insecure__use_cmdline_argv", True),
    "environment from the host": setting("loader.insecure__use_host_env", True),
    "no random addresses": setting("loader.insecure__disable_aslr", True),
    "eventfd of the host": setting("sys.insecure__allow_eventfd", True),
    "exitless calls": setting("sgx.insecure__rpc_thread_num", 4),
    "keys in the manifest": setting("fs.insecure__keys.default", "00" * 16),
    "one variable from the host": setting("loader.env.HOME", {"passthrough": True}),
    "a preloaded library": setting("loader.env.LD_PRELOAD", "/tmp/x.so"),
    "tracebacks of crashes": setting("loader.env.PYTHONFAULTHANDLER", "1"),
    "a file of arguments": setting("loader.argv_src_file", "file:args"),
    "a file of variables": setting("loader.env_src_file", "file:env"),
    "a talkative log": setting("loader.log_level", "trace"),
    "a log file": setting("loader.log_file", "log"),
    "debug": setting("sgx.debug", True),
    "statistics": setting("sgx.enable_stats", True),
    "a profile": setting("sgx.profile.enable", "all"),
    "any file": setting("sgx.file_check_policy", "allow_all_but_log"),
    "an entry point as text": setting("loader.entrypoint", "file:libsysdb.so"),
    "the old attestation": setting("sgx.ra_client_spid", "00"),
    "the old name of threads": setting("sgx.thread_num", 4),
    "a misspelt key": setting("sgx.max_thread", 4),
    "child processes": setting("sys.disallow_subprocesses", False),
    "io_uring": setting("loader.env.UV_USE_IO_URING", "1"),
    "faults told without EDMM": setting("sgx.use_exinfo", True),
    "an odd size": setting("sgx.enclave_size", "3G"),
    "all of shared memory": setting("sgx.allowed_files", ["dev:/dev/shm"]),
    "all of shared memory, with a slash": setting("sgx.allowed_files", ["dev:/dev/shm/"]),
    "a folder of shared memory": setting("sgx.allowed_files", ["dev:/dev/shm/a/b"]),
    "a file of the host": setting("sgx.allowed_files", ["file:/etc/hosts"]),
    "a device": setting("sgx.allowed_files", ["dev:/dev/nvidia0"]),
    "two regions": setting("sgx.allowed_files", ["dev:/dev/shm/a", "dev:/dev/shm/b"]),
    "code that nobody vouches for": mount(path="/opt/plugin", uri="file:/opt/plugin"),
    "the host's device": mount(path="/dev/shm", uri="file:/opt/gramine/runtime"),
    "the host's temporary files": mount(path="/tmp", uri="file:/tmp"),
    "a region elsewhere": mount(type="untrusted_shm", path="/mnt", uri="dev:/dev/shm"),
    "a key of the signer's": mount(type="encrypted", path="/s", uri="file:s", key_name="_sgx_mrsigner"),
    "a key of nobody's": mount(type="encrypted", path="/s", uri="file:s"),
    "another program": setting("loader.argv", ["python3", "-m", "http.server"]),
    "no enclave mode": setting("loader.argv", ["python3", "-m", "asynctsqp.tee", "--model", "x"]),
    "activations shown": setting(
        "loader.argv", ["python3", "-m", "asynctsqp.tee", "--enclave", "--enclave-unprotected-activations"]
    ),
    "activations shown, abbreviated": setting(
        "loader.argv", ["python3", "-m", "asynctsqp.tee", "--enclave", "--enclave-unp"]
    ),
    "a TLS key that the host has": setting(
        "loader.argv", ["python3", "-m", "asynctsqp.tee", "--enclave", "--tls-key", "/app/key.pem"]
    ),
    "the same in one word": setting(
        "loader.argv", ["python3", "-m", "asynctsqp.tee", "--enclave", "--tls-k=/app/key.pem"]
    ),
    "a prompt": setting("loader.argv", ["python3", "-m", "asynctsqp.tee", "--enclave", "--prompt", "x"]),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_manifest_with_what_is_forbidden_fails(name: str, render: Callable[..., Manifest]) -> None:
    manifest = render()
    assert list(check.faults(manifest)) == []
    damaged = copy.deepcopy(manifest)
    FORBIDDEN[name](damaged)
    assert len(list(check.faults(damaged))) >= 1


def test_make_refuses_what_the_check_refuses(tmp_path: Path, render: Callable[..., Manifest]) -> None:
    file = tmp_path / "tee.manifest"
    file.write_text("sgx.debug = true\n")
    done = subprocess.run([sys.executable, str(GRAMINE / "check.py"), str(file)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "sgx.debug" in done.stderr


def test_settings_that_make_no_sense_are_refused(demo_model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text((GRAMINE / "settings.toml").read_text().replace('"256M"', '"much"'))
    command = [sys.executable, str(GRAMINE / "variables.py"), "--model", str(demo_model), "--settings", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


FAKE = """#!{python}
import pathlib, sys, types, jinja2
template, *options = sys.argv[1:]
values = dict(option.removeprefix("-D").split("=", 1) for option in options)
names = {{
    "gramine": types.SimpleNamespace(libos="/opt/libsysdb.so", runtimedir=lambda: "/opt/runtime"),
    "python": types.SimpleNamespace(get_sys_path=lambda _: [pathlib.Path("/usr/lib/python3")]),
}}
text = pathlib.Path(template).read_text()
print(jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(names | values))
"""


def test_make_renders_and_checks(demo_model: Path, tmp_path: Path) -> None:
    """The Makefile's own path from its arguments to a checked manifest, with a stand-in for gramine-manifest."""
    fake = tmp_path / "gramine-manifest"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    folder = tmp_path / "gramine"
    shutil.copytree(GRAMINE, folder)
    for package in ("asynctsqp", "tee_side"):
        (tmp_path / package).symlink_to(ROOT / package)
    command = ["make", "-C", str(folder), f"MODEL={demo_model}", "GPU=tcp://127.0.0.1:7", "SGX=0"]
    command += [f"PYTHON={sys.executable}", "EDMM=1", "tee.manifest"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    manifest = tomllib.loads((folder / "tee.manifest").read_text())
    assert list(check.faults(manifest)) == []
    assert int(manifest["sgx"]["enclave_size"].removesuffix("M")) >= 2048  # of this model, with settings.toml's options
    assert manifest["sgx"]["max_threads"] > 20
    assert "tcp://127.0.0.1:7" in manifest["loader"]["argv"]
    assert manifest["sgx"]["edmm_enable"] is True


@pytest.mark.skipif(shutil.which("gramine-manifest") is None, reason="Gramine is not installed: no gramine-manifest")
def test_gramine_renders_it_too(demo_model: Path) -> None:
    try:
        subprocess.run(
            ["make", "-C", str(GRAMINE), f"MODEL={demo_model}", f"PYTHON={sys.executable}"], check=True, timeout=120
        )
        assert list(check.faults(tomllib.loads((GRAMINE / "tee.manifest").read_text()))) == []
    finally:
        subprocess.run(["make", "-C", str(GRAMINE), "clean"], check=True)
