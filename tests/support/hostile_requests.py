"""Hypothesis strategies for hostile requests, built from the protocol's descriptors.

Requests are bytes rather than messages, because a client in another language can send values
that protobuf's Python classes reject: text that is not UTF-8, numbers wider than the field, both
members of a oneof. New fields and messages are covered automatically.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

from mlxrunner.v1 import runner_pb2 as pb

_Field = FieldDescriptor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_UINT64 = (1 << 64) - 1
_MAX_DEPTH = 4
_MAX_REPEATED_BYTES = 200_000

INTEGERS: tuple[int, ...] = (
    0,
    1,
    -1,
    2,
    21,
    64,
    257,
    512,
    10**9,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32,
    2**63 - 1,
)
INTEGERS += (-(2**63), -(10**9))
FLOATS: tuple[float, ...] = (0.0, -0.0, 0.5, 1.0, 1.4e-45, -1e-9, 101.0, 1e9, -1e9, 3.4e38, -3.4e38)
FLOATS += (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "\0",
    "a\0b",
    "\r\n[ERROR] forged line",
    "\x1b[2J\x1b]0;owned\x07",
    "%s%n{0}${HOME}",
    "\u202eshalom שלום \u2066\u0645\u0631\u062d\u0628\u0627\u2069",
    "👩‍👩‍👧‍👦🏳️‍🌈😀",
    "e" + "\u0301" * 300,
    "\ufeff\ufffe\uffff\U0010ffff",
    "<eos><user><|endoftext|><s></s><|im_start|>system<pad><unk>",
    "../" * 40 + "etc/passwd",
    "/dev/zero",
    "x" * 129,
    "日" * 1025,
    " " * 5000,
    "word " * 40_000,
)
INVALID_UTF8 = (
    b"\xed\xa0\x80",  # a lone high surrogate
    b"\xed\xb0\x80 low",
    b"\xed\xa0\xbd\xed\xb8\x80",  # a surrogate pair, encoded separately as in CESU-8
    b"\xff\xfe",
    b"\xc0\x80",  # NUL in two bytes, as in Java's modified UTF-8
    b"cut \xf0\x9f\x98",
    b"\xf4\x90\x80\x80",  # beyond the last code point
)
MALFORMED = (
    b"\xff",
    b"\x00",
    b"\x0a\x7f",  # a length beyond the end of the data
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\xfb\x7f" * 200,  # nested groups that never end
    b"\x07",  # an unknown wire type
    b"\x80" * 12,
)


def encode_varint(value: int) -> bytes:
    """Encode an integer as a varint; a negative one takes ten bytes."""
    value &= _MAX_UINT64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_field(field: int, kind: int, payload: bytes) -> bytes:
    """Encode one field, tag included."""
    length = encode_varint(len(payload)) if kind == _BYTES else b""
    return encode_varint(field << 3 | kind) + length + payload


_integers = (st.sampled_from(INTEGERS) | st.integers(-3, 600)).map(encode_varint)
_floats = st.sampled_from(FLOATS) | st.floats(width=32) | st.floats(0, 1, width=32)
_utf8 = st.sampled_from(TEXTS).map(str.encode) | st.text(max_size=60).map(str.encode)
# Mostly valid, since a single invalid text spoils the whole request.
_texts = st.one_of(*[_utf8] * 6, st.sampled_from(INVALID_UTF8))

_SCALARS: dict[int, tuple[int, st.SearchStrategy[bytes]]] = {
    **dict.fromkeys(
        (
            _Field.TYPE_INT32,
            _Field.TYPE_INT64,
            _Field.TYPE_UINT32,
            _Field.TYPE_UINT64,
            _Field.TYPE_SINT32,
            _Field.TYPE_SINT64,
            _Field.TYPE_BOOL,
            _Field.TYPE_ENUM,
        ),
        (_VARINT, _integers),
    ),
    _Field.TYPE_FLOAT: (_FIXED32, _floats.map(lambda value: struct.pack("<f", value))),
    _Field.TYPE_DOUBLE: (_FIXED64, _floats.map(lambda value: struct.pack("<d", value))),
    _Field.TYPE_STRING: (_BYTES, _texts),
    _Field.TYPE_BYTES: (_BYTES, st.binary(max_size=60)),
}
"""Wire type and payloads of each scalar type; a field of any other type is an error."""


def _one(field: FieldDescriptor, depth: int) -> st.SearchStrategy[bytes]:
    """Generate a field once, or several times if repeated."""
    if field.message_type:
        inside = messages(field.message_type, depth + 1)
        kind, payloads = _BYTES, inside
    else:
        kind, payloads = _SCALARS[field.type]
    once = payloads.map(lambda payload: encode_field(field.number, kind, payload))
    if not field.is_repeated:
        return once
    several = st.lists(once, max_size=5).map(b"".join)
    many = st.tuples(once, st.sampled_from([65, 300, 2000])).map(lambda pair: _repeat(*pair))
    if kind == _BYTES:
        return several | many
    packed = st.lists(payloads, max_size=40).map(b"".join)
    return several | many | packed.map(lambda data: encode_field(field.number, _BYTES, data))


def _repeat(data: bytes, count: int) -> bytes:
    return data * min(count, max(1, _MAX_REPEATED_BYTES // max(1, len(data))))


@cache
def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[bytes]:
    """Generate the bytes of a message with a few fields set to arbitrary values."""
    if depth > _MAX_DEPTH or not descriptor.fields:
        return st.just(b"")
    fields = [_one(field, depth) for field in descriptor.fields for _ in range(_size(field))]
    return st.lists(st.one_of(fields), max_size=4).map(b"".join)


def _size(field: FieldDescriptor, depth: int = 0) -> int:
    """Count the leaf fields below ``field``, the weight for drawing each about equally often."""
    inside = field.message_type
    if not inside or not inside.fields or depth > _MAX_DEPTH:
        return 1
    return sum(_size(part, depth + 1) for part in inside.fields)


def damaged(sound: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Generate the bytes of a message, truncated or followed by garbage."""
    cut = st.tuples(sound, st.integers(1, 20)).map(lambda pair: pair[0][: -pair[1]])
    tail = st.sampled_from(MALFORMED) | st.binary(min_size=1, max_size=12)
    return cut | st.tuples(sound, tail).map(b"".join)


METHODS = tuple(pb.DESCRIPTOR.services_by_name["RunnerService"].methods)
"""Descriptors of every rpc."""

_SOUND = {
    "Abort": pb.AbortRequest(request_ids=["x"]).SerializeToString(),
    "Completion": pb.CompletionRequest(
        prompt="hi", options=pb.CompletionOptions(num_predict=8)
    ).SerializeToString(),
    "Load": pb.LoadRequest(model="fake").SerializeToString(),
    "Estimate": pb.EstimateRequest(model="fake").SerializeToString(),
}
"""Valid fields put before generated ones, so that not every request lacks a required field."""

Call = tuple[str, bytes]


def calls(accept: Callable[[str], bool]) -> st.SearchStrategy[Call]:
    """Generate pairs of an rpc and a request.

    Requests are generated fields, alone or after valid ones, or such bytes damaged.
    """
    return st.one_of(
        [
            _calls_of(method.name, method.input_type)
            for method in METHODS
            for _ in range(1 + sum(map(_size, method.input_type.fields)))
            if accept(method.name)
        ]
    )


@cache
def _calls_of(name: str, descriptor: Descriptor) -> st.SearchStrategy[Call]:
    bare = messages(descriptor)
    added = bare.map(lambda data: _SOUND.get(name, b"") + data)
    return st.one_of(added, added, bare | damaged(added)).map(lambda data: (name, data))
