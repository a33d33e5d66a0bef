"""The shape of the tree: who may import whom, and what is never used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The doors of the shared package, which open onto one side each; nothing else in it knows a side.
DOORS = {
    "gpu_side": {"gpu.py"},
    "tee_side": {"__init__.py", "engine.py", "tee.py", "command.py", "summary.py", "chat.py"},
}
FORBIDDEN_EVERYWHERE = {"pickle", "marshal", "shelve", "multiprocessing"}


def imports(file: Path) -> Iterator[str]:
    """The first part of every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


def test_the_sides_do_not_know_each_other() -> None:
    for package, other in (("gpu_side", "tee_side"), ("tee_side", "gpu_side")):
        assert sources(package)
        assert not [file for file in sources(package) if other in imports(file)]


@pytest.mark.parametrize("side", DOORS)
def test_only_the_doors_of_the_shared_package_know_a_side(side: str) -> None:
    knowing = {file.name for file in sources("asynctsqp") if side in imports(file)}
    assert knowing <= DOORS[side]


def test_nothing_that_runs_what_a_peer_sent() -> None:
    for package in ("asynctsqp", "gpu_side", "tee_side"):
        for file in sources(package):
            assert not FORBIDDEN_EVERYWHERE & set(imports(file)), file
            names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
            assert not {"eval", "exec", "compile"} & names, file


def test_no_module_is_more_than_one_noun() -> None:
    packages = ("asynctsqp", *DOORS)
    long = {file.name: n for p in packages for file in sources(p) if (n := len(file.read_text().splitlines())) > 300}
    assert not long
