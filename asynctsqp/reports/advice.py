"""What to try, from where the time went: the sentences that all reports end with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from asynctsqp.reports.category import COMMUNICATION, Category
from asynctsqp.reports.records import RpcRecord

SMALL_CALL_BYTES = 256 << 10  # below, a call's cost is its messages and wake-ups, above, it is its bytes
WARN_SHARE = 0.5
SHARED_MEMORY = frozenset({"doorbell", "shm"})


class Traffic(msgspec.Struct, frozen=True):
    """Of all calls: how many, tensor bytes both ways, and the transports by RpcRecord's names."""

    calls: int
    bytes_moved: int
    transports: Collection[str]

    @property
    def small(self) -> bool:
        return self.bytes_moved < self.calls * SMALL_CALL_BYTES

    @property
    def shared(self) -> bool:
        return SHARED_MEMORY.issuperset(self.transports)


def traffic_of(rpcs: Sequence[RpcRecord]) -> Traffic:
    moved = sum(rpc.bytes_sent + rpc.bytes_received for rpc in rpcs)
    return Traffic(len(rpcs), moved, frozenset(rpc.transport for rpc in rpcs))


def advise(shares: Mapping[Category, float], traffic: Traffic) -> tuple[str, ...]:
    """One or two sentences: a warning where communication is most of the time, and what acts on the largest share.

    shares: of the time, 0 to 1. Nothing is said about no time at all.
    """
    largest = max(shares, key=lambda category: shares[category])
    if shares[largest] <= 0:
        return ()
    communication = sum(shares.get(category, 0.0) for category in COMMUNICATION)
    warning = f"Warning: communication takes {100 * communication:.2f} % of the time."
    sentence = f"The largest part, {100 * shares[largest]:.1f} %, is {largest}: {_remedy(largest, traffic)}."
    return (warning, sentence) if communication > WARN_SHARE else (sentence,)


def _remedy(category: Category, traffic: Traffic) -> str:
    match category:
        case Category.TEE:
            return "more --threads shorten it, and more --lanes hide it behind the GPU side's work"
        case Category.GPU:
            return "a GPU (--device cuda on the GPU side), --dtype bfloat16 or more --threads there shorten it"
        case Category.PYTHON:
            return "--partition fused makes fewer calls, each of which costs some Python"
        case Category.SERIALISATION:
            return _fewer_bytes(traffic)
        case _:
            return _fewer_calls(traffic) if traffic.small else _fewer_bytes(traffic)


def _fewer_calls(traffic: Traffic) -> str:
    average = traffic.bytes_moved / traffic.calls / 1024
    fewer = f"the calls are many and small ({traffic.calls}, {average:.1f} KiB each), --partition fused makes fewer"
    if not traffic.shared:
        return f"{fewer}, and --transport shm makes each cheaper where both sides are on one machine"
    if "shm" in traffic.transports:
        return f"{fewer}, and --doorbell on makes each cheaper"
    return fewer


def _fewer_bytes(traffic: Traffic) -> str:
    mib = traffic.bytes_moved / (1 << 20)
    if traffic.shared:
        return f"--dtype bfloat16 halves what float32 tensors take, {mib:.1f} MiB here"
    return (
        f"{mib:.1f} MiB went off shared memory: use --transport shm where both sides are on one machine, "
        "else --dtype bfloat16, and --compress where the link is slow"
    )
