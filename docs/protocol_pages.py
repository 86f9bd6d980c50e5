"""Makes the reference of the protocol, in Markdown, of the comments in its files.

The kept tools for this write sites of their own, or have not been released for years.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[1]
FILES = ("mlxrunner/v1/runner.proto", "mlxrunner/v1/pool.proto")
PROTOSET = ROOT / "proto/mlxrunner/v1/runner.protoset"
"""The files and their comments, as protoc read them."""

# Field numbers of descriptor.proto, of which the paths of comments are made.
_MESSAGE, _ENUM, _SERVICE, _SYNTAX = 4, 5, 6, 12
_FIELD, _VALUE, _METHOD = 2, 2, 2

_TYPE_NAMES = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}

Comments = dict[tuple[int, ...], str]


def write(page: Path) -> None:
    """Writes the page, if it is to change."""
    text = "\n".join(_page(_read()))
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


def _read() -> list[FileDescriptorProto]:
    files = {file.name: file for file in FileDescriptorSet.FromString(PROTOSET.read_bytes()).file}
    return [files[name] for name in FILES]


def _page(files: Sequence[FileDescriptorProto]) -> Iterator[str]:
    yield "# The protocol\n"
    places = " and ".join(f"`proto/{file.name}`" for file in files)
    yield f"Package `{files[0].package}`, as the comments in {places} specify it.\n"
    for file in files:
        yield from _file(file)


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(place.path): _cleaned(place.leading_comments)
        for place in file.source_code_info.location
    }
    yield comments[_SYNTAX,]
    for i, service in enumerate(file.service):
        yield from _service(service, (_SERVICE, i), comments)
    names = ", ".join(service.name for service in file.service)
    yield f"## Messages of {names}\n"
    for i, message in enumerate(file.message_type):
        yield from _message(message, (_MESSAGE, i), comments)
    yield f"## Enums of {names}\n"
    for i, enum in enumerate(file.enum_type):
        yield from _enum(enum, (_ENUM, i), comments)


def _cleaned(comment: str) -> str:
    return "\n".join(line.removeprefix(" ") for line in comment.splitlines()) + "\n"


def _service(
    service: ServiceDescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    yield f"## {service.name}\n"
    yield comments[path]
    for i, method in enumerate(service.method):
        stream = "stream of " if method.server_streaming else ""
        yield f"### {method.name}\n"
        yield f"{_link(method.input_type)} → {stream}{_link(method.output_type)}\n"
        yield comments[*path, _METHOD, i]


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from _heading(message.name)
    yield comments[path]
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    rows = [
        (f"`{field.name}`", _type(field, maps), str(field.number), comments[*path, _FIELD, i])
        for i, field in enumerate(message.field)
    ]
    if rows:
        yield from _table(("field", "type", "no.", ""), rows)


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield from _heading(enum.name)
    yield comments[path]
    rows = [
        (f"`{value.name}`", str(value.number), comments[*path, _VALUE, i])
        for i, value in enumerate(enum.value)
    ]
    yield from _table(("value", "no.", ""), rows)


def _heading(name: str) -> Iterator[str]:
    yield f"(proto-{name.lower()})="
    yield f"### {name}\n"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry:
        key, value = (_type(part, maps) for part in entry.field)
        return f"map of {key} to {value}"
    name = _link(field.type_name) if field.type_name else _TYPE_NAMES[field.type]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(full_name: str) -> str:
    name = full_name.rpartition(".")[2]
    if full_name.startswith(".google."):
        return f"`{full_name.removeprefix('.')}`"
    return f"[{name}](#proto-{name.lower()})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (re.sub(r"\s+", " ", cell).strip().replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"
    yield ""
