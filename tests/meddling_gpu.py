"""The real GPU side in a thread of this process, whose operator sees everything and may change any answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import zmq
import zmq.asyncio

from asynctsqp.checkpoint import Checkpoint
from asynctsqp.loop_thread import set_threads_of_this_thread
from asynctsqp.messages import Hello, ToGpu, encode
from asynctsqp.model_spec import Op
from asynctsqp.sockets import server_socket
from gpu_side.device import choose
from gpu_side.executor import Program, Tensors
from gpu_side.programs import Programs
from gpu_side.router import Reply
from gpu_side.server import Server

Meddle = Callable[[Op, int, torch.Tensor, torch.Tensor], None]  # op, layer, what was sent, the true answer


def leave_alone(op: Op, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
    """An honest operator's."""


class _Meddled:
    """programs.Programs, with the operator's look at each call after its product."""

    def __init__(self, programs: Programs, gpu: MeddlingGpu) -> None:
        self._programs = programs
        self._gpu = gpu

    def of(self, op: Op, layer: int) -> Program:
        program = self._programs.of(op, layer)

        def run(inputs: Tensors, outputs: Tensors) -> None:
            program(inputs, outputs)
            self._gpu.calls += 1
            self._gpu.meddle(op, layer, inputs[0], outputs[0])

        return run


class _Server(Server):
    """The project's own, with a wire tap."""

    gpu: MeddlingGpu

    async def _programs(self, hello: Hello) -> Programs:
        return _Meddled(await super()._programs(hello), self.gpu)

    def _dispatch(self, identity: bytes, frames: list[memoryview]) -> None:
        self.gpu.heard += map(bytes, frames)
        super()._dispatch(identity, frames)

    async def _answer(
        self, identity: bytes, client: Any, message: ToGpu, payload: memoryview | None, reply: Reply
    ) -> None:
        self.gpu.heard.append(encode(message))  # through a doorbell it comes no other way
        if self.gpu.look_at_memory is not None and client is not None and client._region is not None:
            self.gpu.look_at_memory(client._region._view)
        await super()._answer(identity, client, message, payload, reply)


class MeddlingGpu:
    """meddle: may be replaced at any time; heard: every frame and message so far; calls: products made.

    look_at_memory: called with the whole shared region as each call comes.
    """

    def __init__(self, model: Path) -> None:
        self.meddle: Meddle = leave_alone
        self.heard: list[bytes] = []
        self.calls = 0
        self.look_at_memory: Callable[[memoryview], None] | None = None
        self.endpoint = ""
        self._model = model
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(20), "the GPU side does not start"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()

    def _run(self) -> None:
        set_threads_of_this_thread(1)
        asyncio.set_event_loop(self._loop)
        try:
            self._serving = self._loop.create_task(self._serve())
            self._loop.run_until_complete(asyncio.wait((self._serving,)))
            if not self._serving.cancelled():
                self._serving.result()
        finally:
            self._ready.set()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self) -> None:
        context = zmq.asyncio.Context()
        try:
            with server_socket(context) as socket:
                port = socket.bind_to_random_port("tcp://127.0.0.1")
                self.endpoint = f"tcp://127.0.0.1:{port}"
                server = _Server(socket, Checkpoint(self._model), choose("cpu", 1), None)
                server.gpu = self
                self._ready.set()
                await server.run()
        finally:
            context.term()


@contextmanager
def meddling_gpu(model: Path) -> Iterator[MeddlingGpu]:
    gpu = MeddlingGpu(model)
    try:
        yield gpu
    finally:
        gpu.close()
