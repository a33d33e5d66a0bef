"""What Prometheus is told: counts and times, and nothing of what was asked.

Covered: no label and no value depends on the content of a prompt or an answer. Not covered: times and counts of tokens
tell how long they were.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from asynctsqp.engine import ROUND_TRIP_BOUNDS, Engine
from asynctsqp.service.admission import Admission

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN_TOKENS_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
MASKED = ("mask", "full")


class Metrics:
    """One service's, in a registry of its own."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        registry = self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        registry.register(_EngineCollector(engine, admission))
        self.requests = Counter(
            "asynctsqp_http_requests",
            "Requests to the API by what became of them",
            ("path", "status"),
            registry=registry,
        )
        self.first_token = Histogram(
            "asynctsqp_time_to_first_token_seconds",
            "From the start of an answer to its first token",
            buckets=FIRST_TOKEN_BOUNDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "asynctsqp_inter_token_seconds",
            "From each token of an answer to the next one",
            buckets=BETWEEN_TOKENS_BOUNDS,
            registry=registry,
        )
        self._mask_tokens: Gauge | None = None
        if engine.options.protect in MASKED:
            self._mask_tokens = Gauge(
                "asynctsqp_mask_bank_tokens", "Tokens that masks are made ahead for", registry=registry
            )

    async def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        if self._mask_tokens is not None:
            self._mask_tokens.set(await self._engine.prepare_masks(0))
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine's meter says, at the moment of asking."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        engine, meter = self._engine, self._engine.meter
        yield _gauge("asynctsqp_up", "1 while the engine can answer", float(engine.failure is None))
        yield _gauge("asynctsqp_requests_admitted", "Answers that run or wait", self._admission.admitted)
        yield _gauge("asynctsqp_requests_running", "Requests that take part in passes", meter.running)
        yield _gauge("asynctsqp_requests_waiting", "Requests without room for their keys and values", engine.waiting)
        yield _counter("asynctsqp_rpc_sent_bytes", "Of tensors, to the GPU side", meter.bytes_sent)
        yield _counter("asynctsqp_rpc_received_bytes", "Of tensors, from the GPU side", meter.bytes_received)
        yield _counter("asynctsqp_pass_seconds", "In which passes were computed, of all lanes", meter.pass_s)
        yield _counter("asynctsqp_gpu_wait_seconds", "Of that, waiting for the GPU side", meter.wait_s)
        share = meter.wait_s / meter.pass_s if meter.pass_s else 0.0
        yield _gauge("asynctsqp_gpu_wait_share", "Waiting for the GPU side, of all time in passes so far", share)
        yield _counter("asynctsqp_integrity_failures", "Passes in which a wrong answer was caught", meter.wrong_answers)
        bounds = [*map(str, ROUND_TRIP_BOUNDS), "+Inf"]
        yield HistogramMetricFamily(
            "asynctsqp_rpc_round_trip_seconds",
            "From a call to the GPU side to its answer",
            buckets=list(zip(bounds, map(float, meter.round_trips()), strict=True)),
            sum_value=meter.round_trip_s,
        )


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value=value)
