"""The doorbell between two real processes: whatever the moment at which one parks, no message is lost or late."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SEED = "ASYNCTSQP_SEED"  # in the environment: plays a game again
ENOUGH = 50  # wake-ups of either side: fewer would have tested little


@pytest.mark.parametrize(
    ("rounds", "sleep_s"),
    [
        pytest.param(2000, 30.0, id="a sleep without an end, which a lost wake-up would not survive"),
        pytest.param(500, 0.0002, id="sleeps that end just when a wake-up comes"),
    ],
)
def test_no_wake_up_is_lost_between_processes(rounds: int, sleep_s: float) -> None:
    seed = os.environ.get(SEED) or str(secrets.randbits(32))
    print(f"{SEED}={seed}")
    command = [sys.executable, "-m", "tests.doorbell_players", seed, str(rounds), str(sleep_s)]
    game = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert game.returncode == 0, f"{SEED}={seed}: {game.stderr}"
    woken = [int(count) for count in game.stdout.split()]
    assert len(woken) == 2
    assert min(woken) > ENOUGH, f"woken {woken} times: the test tested too little"
