"""The messages of google.rpc beside the protocol: they compile, and are those that servers send."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2

ROOT = Path(__file__).parents[2]
MODULES = ("proto", "third_party")
CONFIGURATION = "version: v2\nmodules:\n  - path: proto\n  - path: third_party\n"
INSTALLED = (status_pb2, error_details_pb2)
SENT = {"Status", "ErrorInfo", "BadRequest", "RetryInfo"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """Compile copies of all protocol files, without those of installed packages."""
    folder = tmp_path_factory.mktemp("protos")
    for name in MODULES:
        for file in (ROOT / name).rglob("*.proto"):
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    (folder / "buf.yaml").write_text(CONFIGURATION)
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run(
        [buf, "build", "--output", "all.binpb"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = FileDescriptorSet.FromString((folder / "all.binpb").read_bytes()).file
    return {file.name: file for file in files}


def test_all_protocol_files_compile_from_the_repository_alone(
    compiled: dict[str, FileDescriptorProto],
) -> None:
    rpc = {"google/rpc/status.proto", "google/rpc/error_details.proto"}
    assert rpc | {"mlxrunner/v1/runner.proto", "mlxrunner/v1/pool.proto"} <= compiled.keys()


def test_the_messages_are_those_of_the_installed_package(
    compiled: dict[str, FileDescriptorProto],
) -> None:
    seen = set()
    for module in INSTALLED:
        installed = module.DESCRIPTOR.message_types_by_name
        for message in compiled[module.DESCRIPTOR.name].message_type:
            if message.name in SENT:
                seen.add(message.name)
                expected = DescriptorProto()
                installed[message.name].CopyToProto(expected)
                assert _fields(message) == _fields(expected)
    assert seen == SENT


def _fields(message: DescriptorProto) -> dict[str, tuple[int, int, int, str]]:
    """Return number, type, label and type name of each field, nested messages included."""
    own: dict[str, tuple[int, int, int, str]] = {
        f"{message.name}.{field.name}": (field.number, field.type, field.label, field.type_name)
        for field in message.field
    }
    for nested in message.nested_type:
        own |= {f"{message.name}.{name}": value for name, value in _fields(nested).items()}
    return own
