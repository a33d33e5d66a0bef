"""`python -m asynctsqp.evaluation`: the command of lm-evaluation-harness, with this engine among its models.

    python -m asynctsqp.evaluation --model asynctsqp --model_args model=DIR,protect=full --tasks ...

All arguments are the harness's; --model_args takes the engine's options by their Python names, and gpu=ENDPOINT.
"""

from __future__ import annotations

import importlib
import sys

from asynctsqp.ending import ended
from asynctsqp.errors import BadInputError


def main() -> int:
    return ended("asynctsqp.evaluation", _run, "the harness failed")


def _run() -> None:
    try:
        harness = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise BadInputError(f"{name} is not installed: pip install 'asynctsqp[eval]'") from None
    importlib.import_module("asynctsqp.harness_model")  # which registers the engine
    harness.cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
