"""What must hold of a manifest before it is signed: `python gramine/check.py tee.manifest`.

Keys: those that Gramine 1.9 knows (python/graminelibos/manifest_check.py there, and Documentation/manifest-syntax.rst),
without the ones that weaken an enclave.

Covered: no key that Gramine does not know or calls insecure; code, libraries and model are trusted files; the host may
write one file of shared memory at most, and may not choose arguments or environment; the TLS key is sealed; no child
processes; production mode unless it was asked for aloud.
Not covered: what the trusted files contain.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KNOWN = {
    *("fs.mounts", "libos.entrypoint", "loader.argv", "loader.entrypoint.uri", "loader.log_level"),
    *("sys.disallow_subprocesses", "sys.enable_sigterm_injection", "sys.stack.size"),
    *("sgx.allowed_files", "sgx.debug", "sgx.edmm_enable", "sgx.enclave_size", "sgx.file_check_policy"),
    *("sgx.isvprodid", "sgx.isvsvn", "sgx.max_threads", "sgx.remote_attestation", "sgx.trusted_files"),
    "sgx.use_exinfo",
}
ENVIRONMENT = "loader.env."
MOUNTS = {  # type -> its keys
    "chroot": {"path", "uri"},
    "tmpfs": {"type", "path"},
    "encrypted": {"type", "path", "uri", "key_name"},
    "untrusted_shm": {"type", "path", "uri"},
}
SHARED = "dev:/dev/shm/"
REQUIRED: dict[str, Any] = {
    "loader.log_level": "error",
    "sgx.file_check_policy": "strict",
    "sys.disallow_subprocesses": True,
    "loader.env.UV_USE_IO_URING": "0",
}
NEVER = ("LD_PRELOAD", "LD_AUDIT", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONFAULTHANDLER")


def main() -> int:
    debug = "--debug" in sys.argv
    (file,) = (Path(word) for word in sys.argv[1:] if word != "--debug")
    found = list(faults(tomllib.loads(file.read_text()), debug))
    for fault in found:
        print(f"{file}: {fault}", file=sys.stderr)
    return min(len(found), 1)


def faults(manifest: dict[str, Any], debug: bool = False) -> Iterator[str]:
    """What is wrong with it, one line each. debug: whether a debug enclave is what was asked for."""
    values = dict(_flat(manifest))
    yield from _keys(values)
    for name, wanted in REQUIRED.items():
        if values.get(name) != wanted:
            yield f"{name} is {values.get(name)!r}, and must be {wanted!r}"
    if values.get("sgx.debug") is not debug:
        yield f"sgx.debug is {values.get('sgx.debug')!r}: a debug enclave hides nothing from its host"
    if values.get("sgx.use_exinfo", False) != values.get("sgx.edmm_enable", False):
        yield "sgx.use_exinfo goes with sgx.edmm_enable, and with nothing else"
    yield from _environment(values)
    yield from _mounts(values.get("fs.mounts", []))
    yield from _files(values)
    yield from _arguments(values.get("loader.argv", []))
    yield from _size(str(values.get("sgx.enclave_size", "")))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and not prefix.startswith(ENVIRONMENT):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _keys(values: dict[str, Any]) -> Iterator[str]:
    for name in values:
        if "insecure__" in name:
            yield f"{name}: Gramine calls it insecure"
        elif name not in KNOWN and not name.startswith(ENVIRONMENT):
            yield f"{name}: no key that is needed here"


def _environment(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name.startswith(ENVIRONMENT):
            if not isinstance(value, str):
                yield f"{name} comes from the host"
            if name.removeprefix(ENVIRONMENT) in NEVER:
                yield f"{name} changes what runs, or what it says"


def _mounts(mounts: list[dict[str, str]]) -> Iterator[str]:
    for mount in mounts:
        kind = mount.get("type", "chroot")
        if set(mount) - {"type"} != MOUNTS.get(kind, set()) - {"type"}:
            yield f"a mount of unknown kind or keys: {mount}"
        elif kind == "untrusted_shm" and (mount["path"], mount["uri"]) != ("/dev/shm", "dev:/dev/shm"):
            yield f"shared memory anywhere but in /dev/shm: {mount}"
        elif kind == "encrypted" and mount["key_name"] != "_sgx_mrenclave":
            yield f"a sealed directory with a key that other enclaves have: {mount}"
        elif kind == "chroot" and (mount["path"] in ("/tmp", "/sealed", "/dev") or mount["path"].startswith("/dev/")):
            yield f"the host's files where the enclave writes: {mount}"


def _files(values: dict[str, Any]) -> Iterator[str]:
    allowed = values.get("sgx.allowed_files", [])
    for uri in allowed:
        name = uri.removeprefix(SHARED)
        if name == uri or not name or "/" in name:
            yield f"allowed file {uri}: only one file of shared memory may be written by the host"
    if len(allowed) > 1:
        yield "more than one allowed file"
    trusted = values.get("sgx.trusted_files", [])
    for mount in values.get("fs.mounts", []):
        if mount.get("type", "chroot") == "chroot" and not _trusted(mount.get("uri", ""), trusted):
            yield f"a mount that no trusted file vouches for: {mount}"


def _trusted(uri: str, trusted: list[Any]) -> bool:
    names = [entry["uri"] if isinstance(entry, dict) else entry for entry in trusted]
    return any(name in (uri, uri.rstrip("/") + "/") for name in names)


def _arguments(argv: list[str]) -> Iterator[str]:
    if argv[1:4] != ["-m", "asynctsqp.tee", "--enclave"]:
        yield "loader.argv starts something else than the TEE side in its enclave mode"
    for flag, _ in _pairs(argv):
        if flag != "--enclave" and "--enclave-unprotected-activations".startswith(flag):  # argparse takes a beginning
            yield "loader.argv shows the host activations"
    for flag in ("--prompt", "--prompt-file", "--stats", "--trace", "--log-rpc"):
        if flag in argv:
            yield f"loader.argv has {flag}, which the host could read"
    for flag, file in _pairs(argv):
        if "--tls-key".startswith(flag) and len(flag) > len("--tls-") and not file.startswith("/sealed/"):
            yield "loader.argv has a TLS key outside /sealed: the host has it, and could read every prompt"


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Each flag and its value, in one word or in two."""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            yield flag, value if equals else following


def _size(size: str) -> Iterator[str]:
    number = size[:-1]
    if size[-1:] not in ("M", "G") or not number.isdigit() or int(number).bit_count() != 1:
        yield f"sgx.enclave_size is {size!r}, and must be a power of two, as 2048M"


if __name__ == "__main__":
    sys.exit(main())
