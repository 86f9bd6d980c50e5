"""Commands about this machine: serve, estimate and doctor."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from runner_client.cli import serve
from runner_client.cli.shared import estimates
from runner_client.errors import NotSupportedError
from runner_client.host import doctor as examination
from runner_client.host.doctor import Finding
from runner_client.memory.gate import MemoryGate
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.reservations import ReservationBook
from runner_common.server_options import SERVER_OPTIONS
from support.command_line import invoke
from support.safetensors_files import attention, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runner_common.server_options import ServerOption

GIB = 2**30


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Capture the command line and environment of the program started by ``serve``."""
    taken = Mock()
    monkeypatch.setattr(serve, "_become", taken)
    return taken


def _arguments(become: Mock) -> list[str]:
    line: list[str] = become.call_args.args[0]
    assert line[0] == sys.executable
    return line[line.index("runner_server") + 1 :]


def test_serve_without_a_model_passes_only_the_address(become: Mock) -> None:
    result = invoke("serve", "--listen", "unix:/run/s")
    assert result.exit_code == 0, result.stderr
    assert _arguments(become) == ["--listen", "unix:/run/s"]


def test_serve_forwards_every_option(become: Mock) -> None:
    samples = {"--listen": "unix:/s", "--model": "m", "--metrics-listen": "[::1]:0"}
    samples |= {"--draft-model": "d"}
    samples |= {"ADDRESS": "a:1", "N": "3", "SIZE": "2GiB", "SECONDS": "1.5", "DIR": "/"}
    samples |= {"FILE": __file__, "NAME=DIR": "a=/", "HOST:PORT": "127.0.0.1:1"}
    given: list[str] = []
    for option in SERVER_OPTIONS:
        given.append(option.flag)
        if not option.is_switch:
            choice = option.choices[-1] if option.choices else None
            given.append(choice or samples.get(option.flag) or samples[option.metavar])
    result = invoke("serve", *given)
    assert result.exit_code == 0, result.stderr
    assert _arguments(become) == given


def test_serve_forwards_every_adapter(become: Mock) -> None:
    given = ["--model", "m", "--adapter", "a=/a", "--adapter", "b=/b=c"]
    result = invoke("serve", *given)
    assert result.exit_code == 0, result.stderr
    assert _arguments(become) == given


def test_serve_accepts_the_long_names_of_sizes(become: Mock) -> None:
    result = invoke("serve", "--model", "m", "--memory-limit-bytes", "8GiB")
    assert result.exit_code == 0, result.stderr
    assert _arguments(become) == ["--model", "m", "--memory-limit", "8GiB"]


@pytest.mark.parametrize("option", SERVER_OPTIONS, ids=lambda option: option.name)
def test_serve_shows_the_help_of_the_server(option: ServerOption) -> None:
    words = " ".join(invoke("serve", "--help").stdout.split())
    assert " ".join(option.help_text.split()) in words


def test_serve_forwards_a_prefix_cache_of_zero(become: Mock) -> None:
    assert invoke("serve", "--model", "m", "--prefix-cache", "0").exit_code == 0
    assert _arguments(become)[-2:] == ["--prefix-cache", "0"]


def test_serve_preloads_the_chosen_blas(
    become: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libfastblas.so"
    library.touch()
    environment = Mock(return_value={"FROM": "child_environment"})
    monkeypatch.setattr(serve, "child_environment", environment)
    assert invoke("serve", "--blas", str(library)).exit_code == 0
    assert environment.call_args.kwargs["blas"] == str(library)
    assert become.call_args.args[1].items() >= {"FROM": "child_environment"}.items()


def test_serve_reports_missing_packages(become: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = NotSupportedError("this Python has no mlx: pip install 'mlx-grpc-runner[cpu]'")
    monkeypatch.setattr(serve, "server_program", Mock(side_effect=missing))
    result = invoke("serve")
    assert result.exit_code == 1
    assert result.stderr == f"error: {missing}\n"
    become.assert_not_called()


@pytest.fixture
def large_model(tmp_path: Path) -> str:
    """Write a sparse model file: 1 GiB of weights as stored, 2 GiB as float32."""
    shapes = {
        "model.embed_tokens.weight": ("BF16", (2**14, 2**15)),
        **attention("model.", layers=1, hidden=64, kv_rows=32),
    }
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64}
    return str(write_model(tmp_path / "large", shapes, config))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a setter of the free GiB, limited by a control group, on a machine without a GPU."""
    monkeypatch.setattr("runner_client.memory.estimation.installed_backend", lambda: "cpu")
    # The model cannot be built, so its need is counted from the headers.
    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)

    def set_free(gib: float) -> None:
        size = int(gib * GIB)
        memory = FreeMemory(size, "cgroup", 64 * GIB, size, None, "EPYC", "cpu")
        gate = MemoryGate(minimum_bytes=0, overhead_bytes=GIB, measure=lambda: memory)
        monkeypatch.setattr(estimates, "MemoryGate", Mock(return_value=gate))

    return set_free


def _rows(text: str) -> dict[str, str]:
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: " ".join(rest.split()) for name, rest in pairs}


def test_estimate_of_a_model_that_fits(large_model: str, free: Callable[[float], None]) -> None:
    free(8)
    result = invoke("estimate", large_model)
    assert result.exit_code == 0, result.stderr
    rows = _rows(result.stdout)
    assert rows["held"] == "as float32, on cpu"
    assert rows["context"] == "4,096 tokens, 4 completions together"
    assert rows["files"] == "1.0 GiB"
    assert rows["weights"] == "2.0 GiB"
    assert rows["free"] == "8.0 GiB limited by the control group (the system 64.0 GiB)"
    assert rows["kept free"] == "1.0 GiB"
    assert rows["available"] == "7.0 GiB"
    assert rows["fits"].startswith("yes, ")


def test_estimate_of_a_model_that_fits_only_as_stored(
    large_model: str, free: Callable[[float], None]
) -> None:
    free(4)
    result = invoke("estimate", large_model)
    assert result.exit_code == 3
    assert _rows(result.stdout)["held"] == "as float32, on cpu"
    assert "which fits: use --dtype auto_or_stored or as_stored" in result.stdout
    assert invoke("estimate", large_model, "--dtype", "float32").exit_code == 3


def test_estimate_falls_back_to_the_stored_format(
    large_model: str, free: Callable[[float], None]
) -> None:
    free(4)
    result = invoke("estimate", large_model, "--dtype", "auto_or_stored")
    assert result.exit_code == 0
    rows = _rows(result.stdout)
    assert rows["held"] == "as stored, on cpu"
    assert rows["fits"].startswith("yes, ")
    assert "as float32 it needs " in result.stdout
    free(99)
    roomy = _rows(invoke("estimate", large_model, "--dtype", "auto_or_stored").stdout)
    assert roomy["held"] == "as float32, on cpu"


def test_estimate_shows_the_memory_reserved_by_other_runners(
    large_model: str, free: Callable[[float], None]
) -> None:
    free(8)
    with ReservationBook().locked() as view:
        other = view.add(2 * GIB, "another")
    try:
        rows = _rows(invoke("estimate", large_model).stdout)
    finally:
        other.release()
    assert rows["reserved"] == "2.0 GiB that 1 other runner may still take"
    assert rows["available"] == "5.0 GiB"


def test_estimate_of_a_model_that_does_not_fit(
    large_model: str, free: Callable[[float], None]
) -> None:
    free(1.5)
    result = invoke("estimate", large_model)
    assert result.exit_code == 3
    assert _rows(result.stdout)["held"] == "as float32, on cpu"
    assert "short; lower --context-length" in result.stdout
    as_json = invoke("estimate", large_model, "--json")
    assert as_json.exit_code == 3
    report = json.loads(as_json.stdout)
    assert report["fits"] is False
    assert report["decision"]["available_bytes"] == GIB // 2
    assert report["estimate"]["required_bytes"] == report["decision"]["required_bytes"]
    assert report["estimate"]["total_bytes"] > report["estimate"]["required_bytes"]


def test_estimate_for_another_machine_is_not_compared(
    large_model: str, free: Callable[[float], None]
) -> None:
    free(0)
    result = invoke("estimate", large_model, "--backend", "cuda")
    assert result.exit_code == 0
    rows = _rows(result.stdout)
    assert rows["held"] == "as stored, on cuda"
    assert rows["fits"].startswith("not compared")
    report = json.loads(invoke("estimate", large_model, "--backend", "cuda", "--json").stdout)
    assert report["fits"] is None


def test_estimate_of_a_missing_model(tmp_path: Path) -> None:
    result = invoke("estimate", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no model at")


GOOD = Finding("Python", "ok", "3.11.7")
SLOW = Finding("BLAS", "warning", "3.6 GFLOP/s", "install a fast BLAS")
BAD = Finding("MLX", "error", "failed:\nno such file", "install it again")


@pytest.mark.parametrize(
    ("findings", "code"), [((GOOD,), 0), ((GOOD, SLOW), 0), ((GOOD, SLOW, BAD), 1)]
)
def test_doctor_exits_by_the_worst_finding(
    monkeypatch: pytest.MonkeyPatch, findings: tuple[Finding, ...], code: int
) -> None:
    monkeypatch.setattr(examination, "examine", lambda **_: findings)
    assert invoke("doctor").exit_code == code
    result = invoke("doctor", "--json")
    assert result.exit_code == code
    report = json.loads(result.stdout)
    assert report["ok"] is (code == 0)
    assert [finding["status"] for finding in report["findings"]] == [f.status for f in findings]


def test_doctor_puts_advice_below_its_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "examine", lambda **_: (GOOD, SLOW, BAD))
    assert invoke("doctor").stdout.splitlines() == [
        "ok       Python  3.11.7",
        "warning  BLAS    3.6 GFLOP/s",
        "         install a fast BLAS",
        "error    MLX     failed:",
        "         no such file",
        "         install it again",
    ]


def test_doctor_prints_numbers_as_json_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("free memory", "ok", "2.0 KiB", facts={"available_bytes": 2048})
    monkeypatch.setattr(examination, "examine", lambda **_: (finding,))
    (printed,) = json.loads(invoke("doctor", "--json").stdout)["findings"]
    assert printed["facts"] == {"available_bytes": 2048}


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_colors_are_off_where_the_terminal_or_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, variable: dict[str, str]
) -> None:
    monkeypatch.setattr(examination, "examine", lambda **_: (GOOD,))
    environment = {"NO_COLOR": "", "TERM": "xterm", **variable}
    result = invoke("doctor", environment=environment, color=True)
    assert ("\x1b[32m" in result.stdout) is not bool(variable)
