"""Rules of the protocol file, and its agreement with the stubs and the error table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from mlxrunner.v1 import pool_pb2, runner_pb2_grpc
from mlxrunner.v1 import runner_pb2 as pb
from runner_server import errors

ROOT = Path(__file__).parents[2]
PROTO_DIR = ROOT / "proto/mlxrunner/v1"
TEXT = (PROTO_DIR / "runner.proto").read_text()
TEXTS = [TEXT, (PROTO_DIR / "pool.proto").read_text()]
DESCRIPTORS = [pb.DESCRIPTOR, pool_pb2.DESCRIPTOR]
REASONS = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()}  # noqa: SIM118
FAULTS = errors.RunnerFault.__subclasses__()
RPC = re.compile(r"((?:^  //.*\n)+)  rpc (\w+)\(", re.MULTILINE)
ROW = re.compile(r"^- ([A-Z_]+) / ([A-Z_]+): ", re.MULTILINE)


def _rpc_comments() -> dict[str, str]:
    """Return the comment of each rpc, without slashes."""
    found = RPC.findall("".join(TEXTS))
    return {name: re.sub(r"^  // ?", "", text, flags=re.MULTILINE) for text, name in found}


def test_every_rpc_has_a_comment() -> None:
    services = [each for file in DESCRIPTORS for each in file.services_by_name.values()]
    assert set(_rpc_comments()) == {method.name for each in services for method in each.methods}


@pytest.mark.parametrize("name", _rpc_comments())
def test_every_rpc_comment_ends_with_its_errors(name: str) -> None:
    _, found, rows = _rpc_comments()[name].partition("\nErrors:")
    assert found
    entries = ROW.findall(rows)
    assert len(entries) == len(re.findall(r"^- ", rows, re.MULTILINE)) > 0
    table = {(f.code.name, pb.ErrorReason.Name(f.reason)) for f in FAULTS}
    for code, reason in entries:
        assert (code, f"ERROR_REASON_{reason}") in table
    # Every row advises the caller.
    for row in re.split(r"^- ", rows, flags=re.MULTILINE)[1:]:
        assert len(row.split()) > 5


def test_the_servers_table_has_exactly_the_reasons_of_the_protocol() -> None:
    used = {pb.ErrorReason.Name(f.reason).removeprefix("ERROR_REASON_") for f in FAULTS}
    assert used == REASONS - {"UNSPECIFIED"}


def test_every_reason_is_listed_by_an_rpc() -> None:
    listed = {reason for text in _rpc_comments().values() for _, reason in ROW.findall(text)}
    assert listed == REASONS - {"UNSPECIFIED"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_comment_of_a_reason_names_its_code(fault: type[errors.RunnerFault]) -> None:
    name = pb.ErrorReason.Name(fault.reason)
    match = re.search(rf"((?:^  //.*\n)+)  {name} = ", TEXT, re.MULTILINE)
    assert match
    comment = re.sub(r"\s+", " ", match[1].replace("//", ""))
    # For INTERNAL the comment needs no more words.
    assert f"Code {fault.code.name}" in comment


def test_numbers_are_signed_and_enums_begin_unspecified() -> None:
    assert not re.search(r"\buint(32|64)\b|\bfixed(32|64)\b", "".join(TEXTS))
    for file in DESCRIPTORS:
        for enum in file.enum_types_by_name.values():
            assert enum.values[0].name.endswith("_UNSPECIFIED")
            assert enum.values[0].number == 0


def test_every_field_and_value_has_a_comment() -> None:
    lines = "".join(TEXTS).splitlines()
    for i, line in enumerate(lines):
        if re.match(r"^  .* = \d+;$", line):
            assert lines[i - 1].lstrip().startswith("//"), line


def test_spans_are_durations() -> None:
    messages = [each for file in DESCRIPTORS for each in file.message_types_by_name.values()]
    for field in (field for message in messages for field in message.fields):
        if field.name.endswith(("_duration", "_age")):
            assert field.message_type
            assert field.message_type.full_name == "google.protobuf.Duration"


def test_the_stubs_come_from_the_pinned_generator() -> None:
    makefile = (ROOT / "Makefile").read_text()
    tools = re.search(r"grpcio-tools==([\d.]+)", makefile)
    assert tools
    assert tools[1] == runner_pb2_grpc.GRPC_GENERATED_VERSION
    floor = re.search(r'"grpcio>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert floor
    assert floor[1] == tools[1]
    gencode = re.search(r"Protobuf Python Version: ([\d.]+)", _read("runner_pb2.py"))
    runtime = re.search(r'"protobuf>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert gencode
    assert runtime
    assert gencode[1] == runtime[1]


def test_the_stubs_match_the_proto(tmp_path: Path) -> None:
    """Compile the file again with buf and compare with the descriptor in the stubs."""
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        pytest.skip("buf is not installed (the dev group)")
    image = tmp_path / "image.binpb"
    arguments = ["build", "--exclude-source-info", "--as-file-descriptor-set", "-o", str(image)]
    subprocess.run([str(buf), *arguments], cwd=ROOT, check=True, timeout=60)
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
    for descriptor in DESCRIPTORS:
        fresh = next(file for file in files if file.name == descriptor.name)
        committed = descriptor_pb2.FileDescriptorProto()
        descriptor.CopyToProto(committed)
        for file in (fresh, committed):
            _drop_json_names(file.message_type)
        assert committed == fresh


def _drop_json_names(messages: object) -> None:
    for message in messages:  # type: ignore[attr-defined]  # a repeated field
        for field in message.field:
            field.ClearField("json_name")
        _drop_json_names(message.nested_type)


def _read(name: str) -> str:
    return (PROTO_DIR / name).read_text()
