"""The site's page of the protocol is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

import protocol_pages
import runner_client
from mlxrunner.v1 import pool_pb2, runner_pb2

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("docs") / "protocol.md"
    protocol_pages.write(path)
    return path.read_text()


def _section(page: str, name: str) -> str:
    found = re.search(rf"^### {name}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


FILES = [runner_pb2.DESCRIPTOR, pool_pb2.DESCRIPTOR]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_field_and_value_is_explained(page: str, file: FileDescriptor) -> None:
    for message in file.message_types_by_name.values():
        section = _section(page, message.name)
        for field in message.fields:
            row = rf"^\| `{field.name}` \| .* \| {field.number} \| \S.*\|$"
            assert re.search(row, section, re.MULTILINE), field.full_name
    for enum in file.enum_types_by_name.values():
        section = _section(page, enum.name)
        for value in enum.values:
            row = rf"^\| `{value.name}` \| {value.number} \| \S.*\|$"
            assert re.search(row, section, re.MULTILINE), value.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_rpc_lists_its_errors(page: str, file: FileDescriptor) -> None:
    (service,) = file.services_by_name.values()
    for method in service.methods:
        section = _section(page, method.name)
        assert "Errors:" in section
        assert f"#proto-{method.input_type.name.lower()})" in section


def test_links_have_targets(page: str) -> None:
    targets = set(re.findall(r"^\(([\w-]+)\)=$", page, re.MULTILINE))
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= targets


def test_maps_lists_and_optional_fields_show_their_types(page: str) -> None:
    options = _section(page, "CompletionOptions")
    assert "| `logit_bias` | map of int32 to float |" in options
    assert "| `stop` | repeated string |" in options
    assert "| `seed` | optional int64 |" in options


def test_every_public_name_of_the_library_is_on_its_page() -> None:
    page = (ROOT / "docs/python.md").read_text()
    whole = set(re.findall(r"automodule:: runner_client\.([\w.]+)", page))
    single = set(re.findall(r"autoclass:: (\w+)", page))
    for name in set(runner_client.__all__) - single:
        home = getattr(runner_client, name).__module__
        assert home.removeprefix("runner_client.") in whole, f"{name} of {home}"
