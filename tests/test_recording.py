"""--stats, --log-rpc and --trace on real runs: they agree with each other, and cost nobody an answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import asynctsqp
from asynctsqp.layouts import Layouts
from asynctsqp.messages import Call, Done
from asynctsqp.model_spec import ModelSpec, Op
from tests.conftest import GpuProcess, run_tee
from tests.peers import lying_gpu

LAYERS = 3  # of the tiny model
TOKENS = 5


@pytest.fixture(scope="module")
def run(
    tiny_gpus: list[GpuProcess], tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """One answer with everything on: (its JSON, the log's lines, the trace)."""
    directory = tmp_path_factory.mktemp("recording")
    log, trace = directory / "rpc.jsonl", directory / "trace.json"
    ended = run_tee(
        *("--model", str(tiny_model("gqa")), "--gpu", tiny_gpus[-1].endpoint, "--prompt", "one two three four"),
        *("--max-new-tokens", str(TOKENS), "--ignore-eos", "--temperature", "0", "--json"),
        *("--stats", "--log-rpc", str(log), "--trace", str(trace)),
    )
    assert ended.returncode == 0, ended.stderr
    assert str(trace) in ended.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return json.loads(ended.stdout), lines, json.loads(trace.read_text())


def test_the_log_has_every_call_and_every_byte(run: Any) -> None:
    answer, lines, _ = run
    assert len(lines) == answer["rpc"]["calls"] == TOKENS * (4 * LAYERS + 1)
    assert sum(line["bytes_sent"] for line in lines) == answer["rpc"]["bytes_sent"]
    assert sum(line["bytes_received"] for line in lines) == answer["rpc"]["bytes_received"]
    methods = Counter(line["method"] for line in lines)
    assert methods == dict.fromkeys(("QKV", "O", "GATE_UP", "DOWN"), TOKENS * LAYERS) | {"LM_HEAD": TOKENS}
    assert {line["transport"] for line in lines} == {"doorbell"}


def test_the_statistics_add_up_to_the_wall_time(run: Any) -> None:
    answer, lines, _ = run
    stats, timing = answer["stats"], answer["timing"]
    assert math.isclose(sum(total["total_s"] for total in stats["totals"]), stats["wall_s"], abs_tol=1e-9)
    assert all(total["total_s"] >= 0 for total in stats["totals"])
    assert stats["wall_s"] >= timing["prefill_s"] + timing["decode_s"]
    rows = {row["name"]: row for section in ("communication", "gpu", "tee") for row in stats[section]}
    assert rows["RPC calls"]["count"] == len(lines)
    assert rows["RMSNORM"]["count"] == TOKENS * (2 * LAYERS + 1)
    assert rows["ROTARY"]["count"] == rows["ATTENTION"]["count"] == rows["SILU"]["count"] == TOKENS * LAYERS
    assert rows["SAMPLER"]["count"] == TOKENS
    assert stats["advice"]


def test_the_trace_has_both_sides_on_one_axis(run: Any) -> None:
    answer, lines, trace = run
    events = trace["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(names) == 2
    first, last = min(e["ts"] for e in events if "ts" in e), max(e["ts"] for e in events if "ts" in e)
    assert (last - first) / 1e6 <= answer["stats"]["wall_s"] + 0.1
    computed = [event for event in events if event["ph"] == "X" and event["name"] in Op.__members__]
    assert len(computed) >= len(lines)


def test_statistics_for_those_who_ask_and_for_each_answer(connect: Callable[..., asynctsqp.Engine]) -> None:
    async def answers(**options: Any) -> list[asynctsqp.Completion]:
        async with connect(**options) as engine:
            return await asyncio.gather(*(engine.complete([1, n], max_new_tokens=3, ignore_eos=True) for n in (5, 6)))

    for done in asyncio.run(answers(stats=True)):
        assert done.stats is not None
        assert 0 < done.stats.wall_s < 60
        msgspec.json.encode(done.stats)
    assert all(done.stats is None for done in asyncio.run(answers()))


@pytest.mark.parametrize("flag", ["--log-rpc", "--trace"])
@pytest.mark.parametrize("name", ["missing/file", ".", "a\0b"])
def test_a_file_that_cannot_be_written_is_known_before_anything_is_loaded(
    flag: str, name: str, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    async def run() -> None:
        option = {flag.removeprefix("--").replace("-", "_"): str(tmp_path / name)}
        async with asynctsqp.Engine.connect(tiny_model("gqa"), "tcp://127.0.0.1:9", **option):
            raise AssertionError("there is no such file, nor such a GPU side")

    with pytest.raises(asynctsqp.BadInputError, match="cannot write"):
        asyncio.run(run())


@pytest.mark.parametrize("claim", [math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324])
def test_claims_about_time_harm_nothing(claim: float, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("gqa")
    layouts = Layouts(ModelSpec.read(model / "config.json"), torch.float32)

    def zeros(call: Any) -> list[list[Any]]:
        size = layouts.of(Op(call.op), call.rows, call.keys).output_bytes
        return [[Done(call.call_id, claim, claim), bytes(size)]]

    async def run(endpoint: str) -> asynctsqp.Completion:
        files = {"log_rpc": str(tmp_path / "log"), "trace": str(tmp_path / "trace")}
        async with asynctsqp.Engine.connect(model, endpoint, transport="binary", stats=True, **files) as engine:
            return await engine.complete([1, 2, 3], max_new_tokens=2, temperature=0, ignore_eos=True)

    with lying_gpu({Call: zeros}) as gpu:
        stats = asyncio.run(run(gpu.endpoint)).stats
    assert stats is not None
    assert math.isclose(sum(total.total_s for total in stats.totals), stats.wall_s, abs_tol=1e-9)
    json.loads((tmp_path / "trace").read_text(), parse_constant=pytest.fail)
    for line in (tmp_path / "log").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
