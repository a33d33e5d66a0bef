"""`python -m asynctsqp.evaluation`: the command of lm-evaluation-harness, with this engine among its models.

    python -m asynctsqp.evaluation --model asynctsqp --model_args model=DIR,protect=full --tasks ...

All arguments are the harness's; --model_args takes the engine's options by their Python names, and gpu=ENDPOINT.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from asynctsqp.ending import at_once, ended, interrupted
from asynctsqp.errors import BadInputError

PROGRAM = "asynctsqp.evaluation"


def main() -> int:
    return ended(PROGRAM, _run, "the harness failed")


def _run() -> None:
    with at_once(lambda: interrupted(PROGRAM)):
        harness = _harness()
    harness.cli_evaluate()


def _harness() -> ModuleType:
    try:
        harness = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise BadInputError(f"{name} is not installed: pip install 'asynctsqp[eval]'") from None
    importlib.import_module("asynctsqp.harness_model")  # which registers the engine
    return harness


if __name__ == "__main__":
    sys.exit(main())
