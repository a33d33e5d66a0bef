"""The control header of one call in four formats: what writing and reading it costs, and its bytes.

The fields are those of `messages.Call`. Reading ends with all six of them as Python integers, whichever format: what
FlatBuffers' readers put off until a field is asked for is asked for here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flatbuffers
import msgpack
from flatbuffers import encode as flatbuffers_encode
from flatbuffers import number_types
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from asynctsqp import messages

FIELDS = ("call_id", "op", "layer", "rows", "keys", "lane", "slot")
SAMPLE = (123_456, 2, 17, 1, 0, 1, 1)  # somewhere in a decode step
BATCH = 1000  # calls between two looks at the clock

Values = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """One way to write a call's FIELDS down."""

    name: str
    encode: Callable[[Values], bytes]
    decode: Callable[[bytes], Values]


def formats() -> tuple[Format, ...]:
    """The project's own one first."""
    return (
        Format("msgspec (this project's)", _msgspec_encode, _msgspec_decode),
        Format("msgpack map", _msgpack_encode, _msgpack_decode),
        _protobuf(),
        Format("FlatBuffers", _flatbuffers_encode, _flatbuffers_decode),
    )


def measure(rounds: int) -> list[dict[str, Any]]:
    """Of each format: its name, bytes, and encode_us and decode_us per call: medians over `rounds` batches.

    The formats take turns: one batch of each in every round.
    """
    compared = formats()
    encoding: list[list[float]] = [[] for _ in compared]
    decoding: list[list[float]] = [[] for _ in compared]
    for _ in range(rounds):
        for index, form in enumerate(compared):
            encoding[index].append(_batch_us(form.encode, SAMPLE))
            decoding[index].append(_batch_us(form.decode, form.encode(SAMPLE)))
    return [
        {
            "format": form.name,
            "bytes": len(form.encode(SAMPLE)),
            "encode_us": statistics.median(encoding[index]),
            "decode_us": statistics.median(decoding[index]),
        }
        for index, form in enumerate(compared)
    ]


def _batch_us(function: Callable[[Any], object], argument: object) -> float:
    began = time.perf_counter()
    for _ in range(BATCH):
        function(argument)
    return (time.perf_counter() - began) * 1e6 / BATCH


def _msgspec_encode(values: Values) -> bytes:
    return messages.encode(messages.Call(*values))


def _msgspec_decode(data: bytes) -> Values:
    call: Any = messages.decode_to_gpu(data)
    return call.call_id, call.op, call.layer, call.rows, call.keys, call.lane, call.slot


def _msgpack_encode(values: Values) -> bytes:
    call_id, op, layer, rows, keys, lane, slot = values
    packed: bytes = msgpack.packb(
        {"call_id": call_id, "op": op, "layer": layer, "rows": rows, "keys": keys, "lane": lane, "slot": slot}
    )
    return packed


def _msgpack_decode(data: bytes) -> Values:
    call = msgpack.unpackb(data)
    return call["call_id"], call["op"], call["layer"], call["rows"], call["keys"], call["lane"], call["slot"]


def _protobuf() -> Format:
    """The message's class is made from its description here: no generated code."""
    file = descriptor_pb2.FileDescriptorProto(name="call.proto", package="benchmarks", syntax="proto3")
    message = file.message_type.add(name="Call")
    kind = descriptor_pb2.FieldDescriptorProto
    for number, name in enumerate(FIELDS, start=1):
        width = kind.TYPE_UINT64 if name == "call_id" else kind.TYPE_UINT32
        message.field.add(name=name, number=number, type=width, label=kind.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmarks.Call"))

    def encode(values: Values) -> bytes:
        call_id, op, layer, rows, keys, lane, slot = values
        data: bytes = made(
            call_id=call_id, op=op, layer=layer, rows=rows, keys=keys, lane=lane, slot=slot
        ).SerializeToString()
        return data

    def decode(data: bytes) -> Values:
        call = made.FromString(data)
        return call.call_id, call.op, call.layer, call.rows, call.keys, call.lane, call.slot

    return Format("protobuf", encode, decode)


def _flatbuffers_encode(values: Values) -> bytes:
    """table Call { call_id: uint64; op: uint8; layer: uint16; rows, keys: uint32; lane, slot: uint8; }"""
    call_id, op, layer, rows, keys, lane, slot = values
    builder = flatbuffers.Builder(64)
    builder.StartObject(len(FIELDS))
    builder.PrependUint64Slot(0, call_id, 0)
    builder.PrependUint32Slot(3, rows, 0)
    builder.PrependUint32Slot(4, keys, 0)
    builder.PrependUint16Slot(2, layer, 0)
    builder.PrependUint8Slot(1, op, 0)
    builder.PrependUint8Slot(5, lane, 0)
    builder.PrependUint8Slot(6, slot, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _flatbuffers_decode(data: bytes) -> Values:
    table = flatbuffers.table.Table(data, flatbuffers_encode.Get(flatbuffers.packer.uoffset, data, 0))
    wide, byte = number_types.Uint64Flags, number_types.Uint8Flags
    return (
        _flatbuffers_field(table, 0, wide),
        _flatbuffers_field(table, 1, byte),
        _flatbuffers_field(table, 2, number_types.Uint16Flags),
        _flatbuffers_field(table, 3, number_types.Uint32Flags),
        _flatbuffers_field(table, 4, number_types.Uint32Flags),
        _flatbuffers_field(table, 5, byte),
        _flatbuffers_field(table, 6, byte),
    )


def _flatbuffers_field(table: Any, index: int, flags: Any) -> int:
    """As generated readers do it: a table's vtable has two entries of 2 bytes before the fields'."""
    offset = table.Offset(4 + 2 * index)
    return int(table.Get(flags, offset + table.Pos)) if offset else 0
