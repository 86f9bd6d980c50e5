"""The lines of README and docs/languages.md, put into a program of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.languages import Failed, Language, run
from interop.servers import ROOT, Server

pytestmark = pytest.mark.timeout(1800)

_BUILD_SECONDS = 900.0
_SECONDS = 120.0
_ADDRESS = "127.0.0.1:50051"
_CPP_TOOLS = ("protoc", "grpc_cpp_plugin", "g++", "pkg-config")
_STUBS = "example.com/mlxrunner"
_GO_PROGRAM = """
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"

	"example.com/mlxrunner/runnerpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

var _ = json.Valid // not every snippet reads JSON

func main() {
	ctx := context.Background()
"""


@pytest.mark.parametrize("language", [Language("go")], ids=["go"])
@pytest.mark.parametrize(
    ("page", "printed"),
    [("README.md", "."), ("docs/languages.md", r"\{City:.* Rain:(true|false)\}")],
    ids=["README", "languages"],
)
def test_the_snippets_for_go_run_in_a_module_of_their_own(
    need: Callable[[Language], None],
    language: Language,
    page: str,
    printed: str,
    servers: dict[str, Server],
    tmp_path: Path,
) -> None:
    need(language)
    snippet = _snippet(page, "go").replace(_ADDRESS, servers["plain"].address)
    (tmp_path / "main.go").write_text(f"{_GO_PROGRAM}{snippet}}}\n")
    stubs = (f"-require={_STUBS}@v0.0.0", f"-replace={_STUBS}={ROOT}/proto/go")
    for arguments in (
        ("mod", "init", "example.com/you"),
        ("mod", "edit", *stubs),
        ("mod", "tidy"),
        ("build", "-o", "snippet"),
    ):
        run(["go", *arguments], f"go {arguments[0]}", _BUILD_SECONDS, tmp_path)
    assert re.search(printed, run(["./snippet"], "snippet for Go", _SECONDS, tmp_path))


@pytest.mark.parametrize("language", [Language("node")], ids=["node"])
def test_the_snippet_for_node_runs(
    need: Callable[[Language], None],
    language: Language,
    servers: dict[str, Server],
    tmp_path: Path,
) -> None:
    need(language)
    language.build()
    # A long prompt causes progress messages without content.
    snippet = _snippet("docs/languages.md", "js", "## Node")
    snippet = snippet.replace('"def read_lines(path):"', '"qz ".repeat(300)')
    assert _run_node(language, snippet, servers["plain"], tmp_path).strip()


@pytest.mark.parametrize("language", [Language("node")], ids=["node"])
def test_the_snippet_for_tools_in_node_runs(
    need: Callable[[Language], None],
    language: Language,
    servers: dict[str, Server],
    tmp_path: Path,
) -> None:
    need(language)
    language.build()
    runner, _, _ = _snippet("docs/languages.md", "js", "## Node").partition("const options")
    snippet = runner + _snippet("docs/languages.md", "js", "## Records")
    found = _run_node(language, snippet, servers["scripted"], tmp_path)
    assert found == "It rains in Zürich.\n"


def _run_node(language: Language, snippet: str, server: Server, folder: Path) -> str:
    """Run lines for Node with the packages of a client; return the output."""
    script = folder / "snippet.mjs"
    snippet = snippet.replace(_ADDRESS, server.address)
    script.write_text(snippet.replace('["proto"]', f'["{ROOT}/proto"]'))
    (folder / "node_modules").symlink_to(language.folder / "node_modules")
    return run(["node", str(script)], "snippet for Node", _SECONDS, folder)


@pytest.mark.parametrize("language", [Language("cpp")], ids=["cpp"])
@pytest.mark.parametrize("place", ["plain", "unix"])
def test_the_program_for_cpp_runs(
    servers: dict[str, Server], cpp_client: str, language: Language, place: str, tmp_path: Path
) -> None:
    what = f"program for {language.name}"
    assert run([cpp_client, servers[place].address, "def f(x):"], what, _SECONDS, tmp_path).strip()
    with pytest.raises(Failed, match=r"(?s)ended with 1:.*UNAUTHENTICATED: "):
        run([cpp_client, servers["token"].address, "x"], what, _SECONDS, tmp_path)


@pytest.fixture(scope="module")
def cpp_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build the program of the page with the commands of the page; return its path."""
    tools = {tool: shutil.which(tool) for tool in _CPP_TOOLS}
    if missing := [tool for tool, path in tools.items() if not path]:
        pytest.skip(f"no {' and no '.join(missing)} on PATH")
    if subprocess.run([str(tools["pkg-config"]), "--exists", "grpc++"], check=False).returncode:
        pytest.skip("no gRPC for C++ (libgrpc++-dev)")
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("proto", "third_party"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "client.cc").write_text(_snippet("docs/languages.md", "cpp"))
    page = (ROOT / "docs/languages.md").read_text(encoding="utf-8")
    section = page[page.index("A C++ client") :]
    (commands,) = re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    script = re.sub(r"^\$ ", "", commands, flags=re.MULTILINE)
    run(["bash", "-ec", script], "build of the program for C++", _BUILD_SECONDS, folder)
    return str(folder / "client")


def _snippet(page: str, language: str, heading: str = "") -> str:
    """Return the only block of a page, or of its section with a heading, in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if heading:
        text = text[text.index(f"\n{heading}") + 1 :].partition("\n## ")[0]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(found)
