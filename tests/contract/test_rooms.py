"""The map of docs/architecture.md: imports between rooms point down the list only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SERVER = (
    *("distributed", "api", "transport", "telemetry", "mlx_backend", "engine", "chat", "host"),
    "errors",
)
"""Rooms of the server from top to bottom. Modules beside them (``app``, ``config``) are above."""

CLIENT = (
    *("cli", "pull", "pool", "process", "memory", "host", "rpc", "testing"),
    *("types", "settings", "checks", "errors"),
)

INNER = (
    "runner_client.cli.shared",
    "runner_client.pool.scheduling",
    "runner_client.rpc.transport",
)
"""Rooms inside a room, which import none of the modules beside them."""

UPPER = ("runner_client.pool.serving",)
"""Rooms inside a room that the modules beside them do not import."""

ROOM_SIZE = 12
"""The most modules in one room of client and common code."""

MLX = ("mlx", "mlx_lm")

WITHOUT_MLX = (
    "runner_server.mlx_backend",
    "runner_server.mlx_backend.model.differences",
    "runner_server.mlx_backend.planning.plan",
    "runner_server.mlx_backend.planning.sizes",
)
"""Modules of the MLX backend that import no MLX, directly or through others."""

ENTRY_POINT = ROOT / "runner_common" / "console.py"
"""The command ``mlx-runner``: takes signals before it imports the client, which is slow."""


def modules(package: str) -> Iterator[tuple[Path, str]]:
    """Yield the file and an imported name for each import of a package, lazy ones included."""
    root = ROOT / "proto" if package == "mlxrunner" else ROOT
    for file in sorted((root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} has a relative import"
                # ``from runner_server import app`` names a module of the package, too.
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


def room(package: str, parts: tuple[str, ...], rooms: tuple[str, ...]) -> int:
    """Return the depth of a room; -1 for a module above all rooms."""
    assert parts[0] == package
    name = parts[1].removesuffix(".py")
    return rooms.index(name) if name in rooms else -1


@pytest.mark.parametrize(
    ("package", "rooms"), [("runner_server", SERVER), ("runner_client", CLIENT)]
)
def test_imports_point_down(package: str, rooms: tuple[str, ...]) -> None:
    upward = []
    for file, imported in modules(package):
        own = file.relative_to(ROOT).parts
        target = tuple(imported.split("."))
        if target[0] != package or own[1] == "__init__.py" or target[1] == "__version__":
            continue
        if room(package, own, rooms) > room(package, target, rooms):
            upward.append(f"{'/'.join(own)} imports {imported}")
    assert not upward


@pytest.mark.parametrize("inner", INNER)
def test_an_inner_room_does_not_import_the_room_around_it(inner: str) -> None:
    around, folder = inner.rpartition(".")[0], ROOT.joinpath(*inner.split("."))
    imports = [(file, name) for file, name in modules("runner_client") if file.parent == folder]
    assert imports
    assert not [
        f"{file.name} imports {name}"
        for file, name in imports
        if name.startswith(f"{around}.") and not name.startswith(f"{inner}.")
    ]


@pytest.mark.parametrize("upper", UPPER)
def test_an_upper_room_is_not_imported_by_the_room_around_it(upper: str) -> None:
    around, folder = upper.rpartition(".")[0], ROOT.joinpath(*upper.split("."))
    imports = [(file, name) for file, name in modules("runner_client") if file.parent != folder]
    assert not [
        f"{file.name} imports {name}"
        for file, name in imports
        if ROOT.joinpath(*around.split(".")) in file.parents and name.startswith(upper)
    ]


@pytest.mark.parametrize("package", ["runner_client", "runner_common"])
def test_rooms_stay_small(package: str) -> None:
    files = (ROOT / package).rglob("*.py")
    sizes = Counter(str(file.parent) for file in files if file.name != "__init__.py")
    assert {folder: size for folder, size in sizes.items() if size > ROOM_SIZE} == {}


@pytest.mark.parametrize("package", ["runner_server", "runner_client"])
def test_every_room_is_on_the_map(package: str) -> None:
    rooms = SERVER if package == "runner_server" else CLIENT
    found = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert found - {"demo"} <= set(rooms)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("mlxrunner", ("runner_common", "runner_server", "runner_client", *MLX)),
        ("runner_common", ("runner_server", "runner_client", *MLX)),
        ("runner_client", ("runner_server", *MLX)),
        ("runner_server", ("runner_client",)),
    ],
)
def test_packages_do_not_import_each_other(package: str, forbidden: tuple[str, ...]) -> None:
    assert not [
        f"{file} imports {name}"
        for file, name in modules(package)
        if name.partition(".")[0] in forbidden and file != ENTRY_POINT
    ]


def test_only_the_mlx_backend_imports_mlx() -> None:
    allowed = ROOT / "runner_server" / "mlx_backend"
    assert not [
        f"{file} imports {name}"
        for file, name in modules("runner_server")
        if name.partition(".")[0] in MLX and allowed not in file.parents
    ]


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_modules_without_mlx_do_not_import_it(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {MLX} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.split() == []


def test_only_servers_import_the_parts_of_servers() -> None:
    """The base install has neither health checks nor reflection."""
    servers = (
        ROOT / "runner_client/pool/serving",
        *(ROOT / "runner_common" / room for room in ("http", "serving")),
    )
    parts = ("runner_common.serving", "grpc_health", "grpc_reflection", "grpc_status")
    assert not [
        f"{file} imports {name}"
        for package in ("runner_client", "runner_common")
        for file, name in modules(package)
        if f"{name}.".startswith(tuple(f"{part}." for part in parts))
        and not set(servers) & set(file.parents)
    ]
