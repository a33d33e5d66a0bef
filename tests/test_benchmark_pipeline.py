"""benchmarks.overlap, concurrency and rpc: what they print. Their times are nobody's business here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import concurrency, overlap, rpc
from benchmarks.rounds import alternate, percentile, used
from benchmarks.rpc_worker import WARM_UP
from benchmarks.timed_gpu import TimedExecutor
from benchmarks.turns import Limits
from tests import models
from tests.benchmark_refusals import assert_refused
from tests.test_benchmark_ladder import benchmark

LAYERS = models.BASE["num_hidden_layers"]
PASS = 4 * LAYERS + 1  # calls, with scores at the end
HIDDEN, INTERMEDIATE, VOCAB = (models.BASE[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
QKV = HIDDEN + 2 * (HIDDEN // 2)  # half as many key heads as heads
PRODUCTS = LAYERS * HIDDEN * (QKV + HIDDEN + 3 * INTERMEDIATE)  # multiplications of a token, without its scores
LAST = HIDDEN * (HIDDEN + 3 * INTERMEDIATE)  # what of them nobody needs whose scores nobody wants
SCORES = HIDDEN * VOCAB
QUICK = ("--rounds", "1", "--limit-s", "0")


def report_of(name: str, model: Path, *options: str) -> dict[str, Any]:
    """What a quick run says, which is the same in its last line and in --out."""
    done = benchmark(name, "--model", str(model), *QUICK, *options, "--out", str(model.parent / f"{name}.json"))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    out = model.parent / f"{name}.json"
    assert report == json.loads(out.read_text())
    out.unlink()
    assert report["benchmark"] == name
    assert report["machine"]["cores"] > 0
    return report


def verdict_of(reached: bool) -> tuple[str, str]:
    """What a benchmark may say of its aim: the machine may have been disturbed."""
    return "reached" if reached else "missed", "disturbed"


def test_lanes_do_the_same_work(tiny_model: Callable[[str], Path]) -> None:
    options = ("--lanes", "2", "--prompt-tokens", "40", "--chunk-tokens", "16", "--sequences", "3", "--steps", "2")
    report = report_of("overlap", tiny_model("gqa"), *options)
    assert report["settings"]["lanes"] == [1, 2]
    prompts, prefill, decode = report["results"]
    assert (prompts["work"], prefill["work"], decode["work"]) == ("prompts", "prefill", "decode")
    assert {row["calls"] for row in prompts["lanes"]} == {3 * (4 * LAYERS + 1)}, "none of them share a batch"
    assert {row["products"] for row in prompts["lanes"]} == {3 * (16 * PRODUCTS - 15 * LAST + SCORES)}
    assert [row["lanes"] for row in prefill["lanes"]] == [1, 2]
    # scores after the last chunk only: the two before it are not computed beyond the last layer's keys and values
    assert {row["calls"] for row in prefill["lanes"]} == {3 * 4 * LAYERS + 1 - 2 * 3}
    assert {row["products"] for row in prefill["lanes"]} == {40 * PRODUCTS - 39 * LAST + SCORES}
    begun = overlap.DECODE_PROMPT_TOKENS * PRODUCTS - (overlap.DECODE_PROMPT_TOKENS - 1) * LAST
    assert {row["products"] for row in decode["lanes"]} == {3 * (begun + 2 * PRODUCTS + 3 * SCORES)}
    for result in report["results"]:
        one, two = result["lanes"]
        assert result["rounds"] == len(result["samples"]) == 1
        assert set(result["samples"][0]) == {"own", "1", "2"}
        assert one["ratio"] == 1
        assert one["verdict"] == ""
        assert two["ratio"] == pytest.approx(two["seconds"] / one["seconds"])
        assert two["verdict"] in verdict_of(two["ratio"] <= report["aim"]["ratio"])
        assert one["device_s"] == pytest.approx(two["device_s"])
        assert one["ideal"] >= 0.5
        assert one["of_sum"] == pytest.approx(one["seconds"] / (result["own_s"] + one["device_s"]))


def test_each_request_gets_its_tokens(tiny_model: Callable[[str], Path]) -> None:
    options = ("--requests", "3", "--prompt-tokens", "8", "--new-tokens", "4")
    report = report_of("concurrency", tiny_model("gqa"), *options)
    one, three = report["results"]["requests"]
    assert (one["requests"], three["requests"]) == (1, 3)
    assert (one["tokens"], three["tokens"]) == (4, 12)
    assert one["calls_of_a_request"] == three["calls_of_a_request"] == 4 * PASS
    assert one["speed_up"] == 1
    assert three["speed_up"] == pytest.approx(three["tokens_per_s"] / one["tokens_per_s"])
    for row in (one, three):
        assert 0 < row["first_ms"]["p50"] <= row["first_ms"]["p99"]
        assert 0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"]


def test_each_way_makes_its_round_trips(tiny_model: Callable[[str], Path]) -> None:
    report = report_of("rpc", tiny_model("gqa"), "--calls", "20")
    ways = report["results"]["ways"]
    assert list(ways) == list(rpc.WAYS)
    # the project's server has answered the first two ways, and none of the others
    calls = WARM_UP + 20
    assert [row["calls"] for row in ways.values()] == [calls, 2 * calls, 2 * calls, 2 * calls, 2 * calls]
    for row in ways.values():
        assert row["round_trips"] == 20
        assert 0 < row["p50_us"] <= row["p99_us"]
    assert ways["spin-loop"]["over_least_us"] == 0
    assert report["results"]["verdict"] in verdict_of(ways["doorbell"]["p50_us"] <= report["aim"]["p50_us"])


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (overlap, ("--prompt-tokens", "512"), "are at most 511"),
        (overlap, ("--steps", "500"), "--steps 495"),
        (overlap, ("--lanes", "0"), "at least 1"),
        (overlap, ("--lanes", "65"), "--lanes is at most 64"),
        (overlap, ("--sequences", "0"), "at least 1"),
        (concurrency, ("--new-tokens", "1"), "--new-tokens 2"),
        (concurrency, ("--prompt-tokens", "500"), "at most 512 together"),
        (concurrency, ("--engine", "dtype=bfloat16"), "use --dtype"),
        (rpc, ("--calls", "0"), "at least 1"),
        (rpc, ("--model", "random:no-such"), "no random model"),
    ],
)
def test_bad_arguments_are_one_line(
    program: ModuleType,
    options: tuple[str, ...],
    words: str,
    tiny_model: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(program, tiny_model("gqa"), options, words, capsys)


def test_calls_of_all_lanes_wait_for_one_device() -> None:
    """In the order in which they came, and never earlier than the set time after the call before."""
    asyncio.run(_three_calls())


async def _three_calls() -> None:
    executor = TimedExecutor()
    executor.set(2e-3, 1e-3 / 3)  # [1, 2] -> [1, 3]: 6 multiplications, 2 ms beside the call's own 2
    ended: list[int] = []

    async def call(lane: int, rows: int) -> tuple[float, float]:
        times = await executor.run(lambda *_: None, (torch.ones(rows, 2),), (torch.zeros(rows, 3),), True, lane)
        ended.append(rows)
        return times

    begin = time.perf_counter()
    times = await asyncio.gather(call(0, 1), call(1, 3), call(0, 2))
    assert time.perf_counter() - begin >= 18e-3
    assert ended == [1, 3, 2]
    assert [seconds for _, seconds in times] == pytest.approx([4e-3, 8e-3, 6e-3])
    assert [start - times[0][0] for start, _ in times] == pytest.approx([0, 4e-3, 12e-3], abs=1e-6)
    assert (executor.calls, executor.products) == (3, 6 + 18 + 12)
    assert min(executor.late_s) >= 0


def test_rounds_are_taken_until_enough_were_quiet() -> None:
    shares = iter([0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    rounds = alternate("ab", lambda name: {"others_share": next(shares), "name": name}, Limits(3, 60), lambda _: None)
    assert [[answer["name"] for answer in taken.values()] for taken in rounds] == [["a", "b"]] * 4
    assert used(rounds) == rounds[1:]
    assert used(rounds[:2]) == rounds[:2]  # too few quiet ones


def test_percentiles_are_samples() -> None:
    assert [percentile([4, 1, 3, 2], percent) for percent in (1, 50, 51, 99, 100)] == [1, 2, 3, 4, 4]
    assert percentile([7], 50) == 7
