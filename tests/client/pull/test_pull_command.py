"""``mlx-runner pull`` against a stand-in of the hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner_client.cli.models import pull
from support.command_line import invoke
from support.hub import StandInHub

WEIGHTS = "model.safetensors"


@pytest.fixture
def environment(hub: StandInHub, tmp_path: Path) -> dict[str, str]:
    """Return the variables of a command that uses the stand-in and an empty cache."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**own, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}


def _command(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "runner_common.console", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.mlx
def test_a_pull_survives_ctrl_c_and_the_model_then_runs(
    hub: StandInHub, environment: dict[str, str]
) -> None:
    hub.stalls[WEIGHTS] = 2_000_000
    with _command(environment, "pull", "org/demo") as process:
        assert process.stderr is not None
        # The first figure of progress says that weights arrive.
        lines = [next(line for line in process.stderr if "%" in line)]
        process.send_signal(signal.SIGINT)
        hub.released.set()
        lines += process.stderr
    assert process.returncode == 130
    assert "Traceback" not in "".join(lines)
    assert lines[-1] == "interrupted\n"
    (partial,) = Path(environment["HF_HOME"]).rglob("*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept <= 2_000_000

    hub.sent.clear()
    with _command(environment, "pull", "org/demo", "--json") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert kept in hub.starts(WEIGHTS)
    assert answer["fits"] is True
    assert answer["fetch_bytes"] < 4_100_000 - kept
    assert hub.tokens == {"Bearer hf_x", ""}  # no token for the storage behind a redirect

    with _command(environment, "run", "org/demo", "The", "--num-predict", "2") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err


@pytest.mark.mlx
def test_a_model_that_cannot_fit_is_refused_before_its_weights(
    hub: StandInHub, environment: dict[str, str]
) -> None:
    environment |= {"MLX_RUNNER_MEMORY_MINIMUM": "1000GiB"}
    result = invoke("pull", "org/demo", "--json", environment=environment)
    assert result.exit_code == 3, result.stderr
    assert "org/demo requires" in result.stderr
    assert "--memory-override" in result.stderr
    answer = json.loads(result.stdout)
    assert answer["fits"] is False
    assert answer["path"] is None
    assert hub.sent_bytes(WEIGHTS) <= 100_000
    assert not Path(environment["HF_HOME"]).exists()

    arguments = ("pull", "org/demo", "--memory-override", "--dry-run")
    result = invoke(*arguments, environment=environment)
    assert result.exit_code == 0, result.stderr
    assert "to fetch" in result.stdout
    assert not Path(environment["HF_HOME"]).exists()


@pytest.mark.mlx
def test_a_type_that_mlx_lm_cannot_build_is_refused(
    hub: StandInHub, environment: dict[str, str]
) -> None:
    files = hub.trees[hub.revisions["main"]]
    config = json.loads(files["config.json"]) | {"model_type": "abacus"}
    hub.commit({**files, "config.json": json.dumps(config).encode()})
    result = invoke("pull", "org/demo", environment=environment)
    assert result.exit_code == 1
    assert "abacus" in result.stderr
    assert "org/demo" in result.stderr
    assert "mlx-runner-pull-" not in result.stderr


def test_a_refusal_of_the_hub_is_one_line(hub: StandInHub, environment: dict[str, str]) -> None:
    hub.statuses["/api/models/org/demo"] = (404, {"X-Error-Code": "RepoNotFound"})
    with _command(environment, "pull", "org/demo") as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: there is no model org/demo at ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/models/a"], "'/models/a' is not the name of a model on the hub"),
        (["org/a@v1", "--revision", "v2"], "give the revision once"),
        (["org/a", "--revision", "../v"], "is not a branch, a tag or a commit"),
    ],
)
def test_wrong_names_are_wrong_usage(arguments: list[str], message: str) -> None:
    result = invoke("pull", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "find_spec", lambda _name: None)
    result = invoke("pull", "org/demo")
    assert result.exit_code == 1
    assert "install mlx-grpc-runner with the extra pull" in result.stderr


def test_commands_do_not_import_the_package() -> None:
    code = "import sys, runner_client.cli; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
