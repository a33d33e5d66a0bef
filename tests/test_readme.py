"""The README's Python example is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs(demo_model: Path, tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    script = tmp_path / "example.py"
    script.write_text(example[1])
    done = subprocess.run(
        [sys.executable, str(script), str(demo_model)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "torch.Size([3, 49152])" in done.stdout


def test_the_tree_is_the_tree() -> None:
    """Every module is named in the README, and nothing is named that is not there."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    packages = [ROOT / package for package in ("asynctsqp", "gpu_side", "tee_side")]
    modules = {file.name for package in packages for file in package.rglob("*.py")}
    named = set(re.findall(r"\w+\.py", tree))
    assert named == modules - {"__init__.py"}
