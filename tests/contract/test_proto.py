"""The protocol's own rules, and that stubs and error table follow it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_server import errors

ROOT = Path(__file__).parents[2]
PROTO_DIR = ROOT / "proto/mlxrunner/v1"
TEXT = (PROTO_DIR / "runner.proto").read_text()
REASONS = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()}  # noqa: SIM118
FAULTS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.RunnerFault)
]
RPC = re.compile(r"((?:^  //.*\n)+)  rpc (\w+)\(", re.MULTILINE)
ROW = re.compile(r"^- ([A-Z_]+) / ([A-Z_]+): ", re.MULTILINE)


def _rpcs() -> dict[str, str]:
    """The comment of each rpc, without its slashes."""
    found = RPC.findall(TEXT)
    return {name: re.sub(r"^  // ?", "", text, flags=re.MULTILINE) for text, name in found}


def test_every_rpc_has_a_comment() -> None:
    service = pb.DESCRIPTOR.services_by_name["RunnerService"]
    assert set(_rpcs()) == {method.name for method in service.methods}


@pytest.mark.parametrize("name", _rpcs())
def test_every_rpc_ends_with_its_errors(name: str) -> None:
    _, found, rows = _rpcs()[name].partition("\nErrors:")
    assert found
    if name == "Status":
        assert rows.strip() == "none of its own."
        return
    entries = ROW.findall(rows)
    assert len(entries) == len(re.findall(r"^- ", rows, re.MULTILINE)) > 0
    table = {(f.code.name, pb.ErrorReason.Name(f.reason)) for f in FAULTS}
    for code, reason in entries:
        assert (code, f"ERROR_REASON_{reason}") in table
    # What the caller does stands in every row.
    for row in re.split(r"^- ", rows, flags=re.MULTILINE)[1:]:
        assert len(row.split()) > 5


def test_every_reason_is_in_the_servers_table_and_the_other_way_round() -> None:
    used = {pb.ErrorReason.Name(f.reason).removeprefix("ERROR_REASON_") for f in FAULTS}
    assert used == REASONS - {"UNSPECIFIED"}


def test_every_reason_is_told_of_by_an_rpc() -> None:
    told = {reason for text in _rpcs().values() for _, reason in ROW.findall(text)}
    assert told == REASONS - {"UNSPECIFIED"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_code_of_a_reason_is_the_one_in_its_comment(fault: type[errors.RunnerFault]) -> None:
    name = pb.ErrorReason.Name(fault.reason)
    match = re.search(rf"((?:^  //.*\n)+)  {name} = ", TEXT, re.MULTILINE)
    assert match
    comment = re.sub(r"\s+", " ", match[1].replace("//", ""))
    # INTERNAL needs no more words than that MLX raised.
    assert f"Code {fault.code.name}" in comment


def test_no_unsigned_numbers_and_unspecified_first() -> None:
    assert not re.search(r"\buint(32|64)\b|\bfixed(32|64)\b", TEXT)
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values[0].name.endswith("_UNSPECIFIED")
        assert enum.values[0].number == 0


def test_every_field_and_value_has_a_comment() -> None:
    lines = TEXT.splitlines()
    for i, line in enumerate(lines):
        if re.match(r"^  .* = \d+;$", line):
            assert lines[i - 1].lstrip().startswith("//"), line


def test_spans_are_durations() -> None:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            if field.name.endswith(("_duration", "_age")):
                assert field.message_type
                assert field.message_type.full_name == "google.protobuf.Duration"


def test_the_stubs_are_those_of_the_pinned_generator() -> None:
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


def test_the_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    """Compiled again with buf, the file says what the stubs were generated from."""
    buf = Path(sys.executable).parent / "buf"
    if not buf.exists():
        pytest.skip("buf is not installed (the dev group)")
    image = tmp_path / "image.binpb"
    arguments = ["build", "--exclude-source-info", "--as-file-descriptor-set", "-o", str(image)]
    subprocess.run([str(buf), *arguments], cwd=ROOT, check=True, timeout=60)
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
    fresh = next(file for file in files if file.name == "mlxrunner/v1/runner.proto")
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
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
