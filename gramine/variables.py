"""The template's variables, from settings.toml, the model and make's arguments: prints -D options for gramine-manifest.

Sizes and threads come from `python -m tee_side.enclave_size`, with the same options.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_ENGINE = {"serve", "tls_cert", "tls_key", "api_keys"}  # arguments of the service, which change no size
API_KEYS = "/app/api-keys"  # inside
MESSAGES = ("binary", "msgpack")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_name("settings.toml"))
    parser.add_argument("--model", required=True, help="a directory, or random:NAME")
    parser.add_argument("--gpu", default="tcp://127.0.0.1:5555", help="tcp://HOST:PORT")
    parser.add_argument("--attestation", choices=("none", "dcap"), default="dcap")
    for flag in ("--sgx", "--edmm", "--debug"):
        parser.add_argument(flag, choices=("0", "1"), default="0")
    parser.add_argument("--table", action="store_true", help="print the arithmetic of the sizes instead")
    given = parser.parse_args()
    settings = tomllib.loads(given.settings.read_text())
    if given.table:
        print(_enclave_size(_sized(settings["arguments"]), given.model))
        return 0
    values = variables(
        settings,
        given.model,
        given.gpu,
        sgx=given.sgx == "1",
        edmm=given.edmm == "1",
        debug=given.debug == "1",
        attestation=given.attestation,
    )
    print(" ".join(shlex.quote(f"-D{name}={value}") for name, value in values.items()))
    return 0


def variables(
    settings: dict[str, Any], model: str, gpu: str, *, sgx: bool, edmm: bool, debug: bool, attestation: str
) -> dict[str, str]:
    """Every name that the template uses and that gramine-manifest does not bring itself."""
    arguments = settings["arguments"]
    directory = "" if model.startswith("random:") else str(Path(model).resolve(strict=True))
    shared = arguments.get("transport", "auto") not in MESSAGES
    arguments = {name: value for name, value in arguments.items() if shared or name != "shm_name"}
    size = json.loads(_enclave_size(_sized(arguments), model, "--json"))
    interpreter = os.path.realpath(sys.executable)
    given = {"model": "/model" if directory else model, "gpu": gpu} | arguments
    keys = arguments.get("api_keys", "")
    if keys:
        given["api_keys"] = API_KEYS
    argv = [interpreter, "-m", "asynctsqp.tee", "--enclave", *flags(given)]
    return {
        "argv": json.dumps(argv),  # a TOML array of basic strings is written as a JSON one
        "entrypoint": interpreter,
        "interpreter": os.path.abspath(sys.executable),  # of the virtual environment, for its sys.path
        "arch_libdir": f"/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "repository": str(REPOSITORY),
        "model_directory": directory,
        "api_keys": str(Path(__file__).with_name(keys)) if keys else "",
        "shm_name": arguments["shm_name"] if shared else "",
        "threads": str(arguments["threads"]),
        "sgx": str(int(sgx)),
        "edmm": toml(edmm),
        "debug": toml(debug),
        "attestation": attestation,
        "enclave_size": size["enclave_size"],
        "max_threads": str(size["max_threads"]),
        "stack_size": size["stack_size"],
        "isvprodid": str(settings["enclave"]["isvprodid"]),
        "isvsvn": str(settings["enclave"]["isvsvn"]),
    }


def _sized(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that change a size."""
    shared = arguments.get("transport", "auto") not in MESSAGES
    return {
        name: value for name, value in arguments.items() if name not in NOT_ENGINE and (shared or name != "shm_name")
    }


def _enclave_size(arguments: dict[str, Any], model: str, *more: str) -> str:
    """What tee_side.enclave_size prints; it refuses options that make no sense."""
    model = model if model.startswith("random:") else str(Path(model).resolve())
    command = [sys.executable, "-m", "tee_side.enclave_size", "--model", model, *flags(arguments), *more]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(REPOSITORY)}  # as in the template
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def flags(arguments: dict[str, Any]) -> list[str]:
    """As the command takes them."""
    words = []
    for name, value in arguments.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def toml(value: bool) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    sys.exit(main())
