"""The async Python API. An engine is the TEE side in a thread of this process.

async with asynctsqp.Engine.launch(model) as engine:
    async for piece in engine.generate("Once upon a time", max_new_tokens=64):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from asynctsqp import enclave_mode
from asynctsqp.checkpoint import Checkpoint
from asynctsqp.config import EngineOptions, SamplingOptions, make
from asynctsqp.cores import default_threads
from asynctsqp.endpoints import check_apart, check_endpoint
from asynctsqp.errors import AsynctsqpError, EngineClosed
from asynctsqp.filling import Report, silent
from asynctsqp.loop_thread import LOOPS, LoopThread
from asynctsqp.reports.clock import ClockOffset
from tee_side.local_gpu import LocalGpuSide
from tee_side.meter import ROUND_TRIP_BOUNDS, Meter
from tee_side.pipeline import Pipeline
from tee_side.request import Completion, Piece, Progress
from tee_side.scores import Alternative, TokenScore
from tee_side.tokenizer import Prompt

__all__ = [
    "ROUND_TRIP_BOUNDS",
    "Alternative",
    "Completion",
    "Engine",
    "Meter",
    "Piece",
    "Progress",
    "Prompt",
    "TokenScore",
]


class Engine:
    """Make it with `launch` or `connect` and use it as an async context manager.

    All methods may be called from any asyncio loop, which is never blocked, and many at once. Errors are those
    of asynctsqp.errors: BadInputError for options, files and prompts, GpuSideError for the other side.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        gpu: str | None,
        options: dict[str, Any],
        report: Report = silent,
        started: LocalGpuSide | None = None,
    ) -> None:
        """started: a GPU side that comes up already, for these options; the engine stops it."""
        self._model = os.fspath(model)
        self._gpu = None if gpu is None else check_endpoint("--gpu", gpu)
        self.options = make(EngineOptions, {"enclave": enclave_mode.implied()} | options)
        if self.options.enclave:
            enclave_mode.check_gpu(self._gpu)
            enclave_mode.check_peer(self._gpu, self.options)
        check_apart(self._gpu, self.options.mask_peer)
        self._report = report
        self._thread: LoopThread | None = None
        self._pipeline: Pipeline | None = None
        self._local = started
        self.clock: ClockOffset | None = None  # of the trace, once it has been written

    @classmethod
    def launch(cls, model: str | os.PathLike[str], *, report: Report = silent, **options: Any) -> Engine:
        """An engine with a GPU side of its own on this machine. Options: config.EngineOptions.

        report: told, from any thread, how far weights are read and masks are made.
        """
        return cls(model, None, options, report)

    @classmethod
    def connect(cls, model: str | os.PathLike[str], gpu: str, *, report: Report = silent, **options: Any) -> Engine:
        """An engine that uses the GPU side at an endpoint, as in 'tcp://127.0.0.1:5555'. Options as for `launch`."""
        return cls(model, gpu, options, report)

    async def __aenter__(self) -> Engine:
        if self._thread is not None:
            raise EngineClosed("this engine is running already")
        threads = self.options.threads or default_threads()
        self._thread = LoopThread("asynctsqp", threads, LOOPS[self.options.loop])
        try:
            self._pipeline = await self._thread.run(self._open(threads))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    async def generate(
        self, prompt: Prompt, *, progress: Progress | None = None, logprobs: int | None = None, **sampling: Any
    ) -> AsyncGenerator[Piece, None]:
        """Yields a Piece for each token. prompt: text, token ids, or chat messages; sampling: SamplingOptions.

        progress: where counts and times are written, up to date at each piece. logprobs: each piece says how likely
        its token was, and so many likeliest ones (0 to 20) with it; None: no such work is done. Ending the iteration
        early, or cancelling it, ends the work and frees what it held.
        """
        thread, pipeline = self._running()
        options = make(SamplingOptions, sampling)
        caller = asyncio.get_running_loop()
        arrived: asyncio.Queue[Piece] = asyncio.Queue()

        async def produce() -> None:
            answer = pipeline.generate(prompt, options, progress or Progress(), logprobs)
            async with contextlib.aclosing(answer) as pieces:
                async for piece in pieces:
                    caller.call_soon_threadsafe(arrived.put_nowait, piece)

        producer = asyncio.ensure_future(thread.run(produce()))
        try:
            while not producer.done() or not arrived.empty():
                piece = await _next(arrived, producer)
                if piece is not None:
                    yield piece
            await producer
        finally:
            producer.cancel()
            # the caller's loop may stand still after this: what was begun in it must have ended
            await asyncio.gather(producer, return_exceptions=True)

    async def complete(self, prompt: Prompt, *, logprobs: int | None = None, **sampling: Any) -> Completion:
        """`generate`, all at once."""
        progress = Progress()
        async with contextlib.aclosing(
            self.generate(prompt, progress=progress, logprobs=logprobs, **sampling)
        ) as stream:
            pieces = [piece async for piece in stream]
        return Completion.of(pieces, progress)

    async def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The scores after each of the tokens: [tokens, vocab] float32."""
        thread, pipeline = self._running()
        return await thread.run(pipeline.logits(token_ids))

    @property
    def meter(self) -> Meter:
        """What the engine has done so far, in numbers."""
        return self._running()[1].meter

    @property
    def waiting(self) -> int:
        """Requests that wait for room for their keys and values."""
        return self._running()[1].waiting

    @property
    def fingerprint(self) -> bytes:
        """Of the model: the 32 bytes that both sides compare."""
        return self._running()[1].fingerprint

    @property
    def failure(self) -> AsynctsqpError | None:
        """What any request would fail with now, as far as it is known without asking; None: it would run."""
        return self._running()[1].failure

    async def keep_connected(self) -> None:
        """Makes a lost link to the GPU side again, whether or not a request waits for it. Runs until it is cancelled.

        What --reconnect-s says about a request that meets the loss stays as it is.
        """
        thread, pipeline = self._running()
        await thread.run(pipeline.keep_connected())

    async def score(self, prompt: Prompt, top: int = 0) -> list[TokenScore]:
        """How likely each token of a prompt was after those before it, and so many likeliest ones (0 to 20) with it.

        The first token's log-probability is None. Holds the scores of one chunk at a time, not of the whole prompt. The
        last token may be one more than the context holds: nothing is computed from it.
        """
        thread, pipeline = self._running()
        return await thread.run(pipeline.score(prompt, top))

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt is to the model."""
        thread, pipeline = self._running()
        return await thread.run(pipeline.tokenize(prompt))

    @property
    def context_tokens(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._running()[1].spec.max_positions

    async def prepare_masks(self, tokens: int) -> int:
        """Makes masks for so many tokens ahead, or for as many as --mask-memory holds; returns for how many there are.

        Otherwise they are made while the engine is idle, and where a request finds none. 0 where nothing is masked.
        """
        thread, pipeline = self._running()
        return await thread.run(pipeline.prepare_masks(tokens, self._report))

    def _running(self) -> tuple[LoopThread, Pipeline]:
        if self._thread is None or self._pipeline is None:
            raise EngineClosed("the engine is not running: use it inside `async with`")
        return self._thread, self._pipeline

    async def _open(self, threads: int) -> Pipeline:
        checkpoint = await asyncio.to_thread(Checkpoint.find, self._model)
        endpoint = self._endpoint(checkpoint)
        return await Pipeline.open(checkpoint, self.options, endpoint, threads, self._report)

    def _endpoint(self, checkpoint: Checkpoint) -> Callable[[], Awaitable[str]]:
        if self._gpu is not None:
            return _fixed(self._gpu)
        local = self._local = self._local or LocalGpuSide(checkpoint.model, self.options)

        async def endpoint() -> str:
            return await asyncio.to_thread(local.endpoint)

        return endpoint

    async def _close(self) -> None:
        thread, self._thread = self._thread, None
        pipeline, self._pipeline = self._pipeline, None
        if thread is None:
            return
        local, self._local = self._local, None
        try:
            self.clock = await thread.run(_shut_down(pipeline, local))
        finally:
            await asyncio.to_thread(thread.stop)


async def _next(arrived: asyncio.Queue[Piece], producer: asyncio.Future[None]) -> Piece | None:
    """The next piece, or None once the producer has ended."""
    get = asyncio.ensure_future(arrived.get())
    try:
        await asyncio.wait((get, producer), return_when=asyncio.FIRST_COMPLETED)
        return get.result() if get.done() else None
    finally:
        get.cancel()


async def _shut_down(pipeline: Pipeline | None, local: LocalGpuSide | None) -> ClockOffset | None:
    """Ends what still runs in the engine's loop, then the link, then the local GPU side.

    Raises BadInputError for a report that cannot be written.
    """
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
        return None if pipeline is None else await pipeline.close()
    finally:
        if local is not None:
            await asyncio.to_thread(local.stop)


def _fixed(endpoint: str) -> Callable[[], Awaitable[str]]:
    async def address() -> str:
        return endpoint

    return address
