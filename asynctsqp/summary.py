"""The three lines that follow an answer."""

from __future__ import annotations

from tee_side.request import Progress

MIB = 1 << 20


def summary(progress: Progress) -> str:
    """Speed, traffic, and how much of the time went into waiting for the GPU side."""
    timing, rpc = progress.timing, progress.rpc
    total_s = timing.prefill_s + timing.decode_s
    speed = f"{1e3 / timing.ms_per_token:.1f} tokens/s" if timing.ms_per_token else "one token"
    return "\n".join(
        (
            f"{progress.completion_tokens} tokens, {speed} ({progress.prompt_tokens} prompt tokens in "
            f"{timing.prefill_s:.2f} s)",
            f"{rpc.calls} RPCs, {rpc.bytes_sent / MIB:.1f} MiB sent, {rpc.bytes_received / MIB:.1f} MiB received",
            f"{rpc.wait_s:.2f} s of waiting for the GPU side in {total_s:.2f} s",
        )
    )
