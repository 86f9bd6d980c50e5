"""Settings of a pool, from code and from a file, and arguments of its methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    ModelSettings,
    PoolSettings,
    RunnerPool,
    errors,
)
from support.pool_machine import Machine


def read(path: Path, text: str) -> PoolSettings:
    """Return the settings of a file with this text."""
    file = path / "models.toml"
    file.write_text(text)
    return PoolSettings.from_file(file)


def test_a_file_has_all_settings(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        """
        budget = "24GiB"
        reserve_bytes = 1024
        max_wait_seconds = 20
        spare_processes = 2

        [default]
        keep_alive_seconds = inf
        parallel = 2

        [models."org/chat"]
        context_length = 8192
        prefix_cache = "1GiB"
        memory_limit = "2GiB"
        dtype = "as_stored"
        priority = -1
        pinned = true
        adapters = { sql = "/adapters/sql" }

        [models."/models/code"]
        prefix_cache_bytes = 0
        keep_alive_seconds = 5.5
        """,
    )
    default = ModelSettings(keep_alive_seconds=math.inf, options=LoadOptions(parallel=2))
    chat = ModelSettings(
        keep_alive_seconds=math.inf,
        priority=-1,
        pinned=True,
        options=LoadOptions(
            parallel=2,
            context_length=8192,
            prefix_cache_bytes=2**30,
            memory_limit_bytes=2**31,
            dtype="as_stored",
            adapters={"sql": "/adapters/sql"},
        ),
    )
    code = ModelSettings(
        keep_alive_seconds=5.5, options=LoadOptions(parallel=2, prefix_cache_bytes=0)
    )
    assert settings == PoolSettings(
        budget_bytes=24 * 2**30,
        reserve_bytes=1024,
        max_wait_seconds=20,
        spare_processes=2,
        default=default,
        models={"org/chat": chat, "/models/code": code},
    )
    assert settings.of("org/chat") == chat
    assert settings.of("org/other") == default


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == PoolSettings()


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("budgets = 1", "budgets", "there is no such setting; known are ageing_seconds, budget"),
        ('budget = "24 GX"', "budget", "size"),
        ("budget = 0", "budget_bytes", "not in the range"),
        ('budget = "1GiB"\nbudget_bytes = 1', "budget_bytes", "given twice"),
        ("max_wait_seconds = -1", "max_wait_seconds", "at least 0"),
        ("ageing_seconds = 0", "ageing_seconds", "above 0"),
        ("return_seconds = nan", "return_seconds", "at least 0"),
        ("default = 1", "default", "must be a table"),
        ("models = 1", "models", "must be a table"),
        ("[models]\na = 1", "models.a", "must be a table"),
        ("[default]\nbudget = 1", "default.budget", "no such setting"),
        ("[default]\noptions = 1", "default.options", "no such setting"),
        ("[default]\nkeep_alive_seconds = -1", "default.keep_alive_seconds", "at least 0"),
        ("[default]\nkeep_alive_seconds = nan", "default.keep_alive_seconds", "at least 0"),
        ("[default]\nmemory_override = true", "default.memory_override", "cannot be overridden"),
        ("[models.a]\npriority = 101", "models.a.priority", "not in the range -100 to 100"),
        ("[models.a]\nparallel = 0", "models.a.parallel", "not in the range"),
        ('[models.a]\ndtype = "int4"', "models.a.dtype", "not one of"),
        ('[models.a]\nprefix_cache = "much"', "models.a.prefix_cache", "size"),
    ],
)
def test_a_wrong_value_of_a_file_is_refused_by_key(
    tmp_path: Path, text: str, key: str, message: str
) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{key}: ")
    assert [field for field, _ in caught.value.field_violations] == [key]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("budget = 1.5", "budget_bytes"),
        ("budget = true", "budget_bytes"),
        ('max_wait_seconds = "20"', "max_wait_seconds"),
        ('[default]\npinned = "no"', "default.pinned"),
        ("[models.a]\nparallel = 1.5", "models.a.parallel"),
        ('[models.a]\npriority = "high"', "models.a.priority"),
        ('[models.a]\nadapters = ["sql"]', "models.a.adapters"),
        ("[models.a]\nadapters = { sql = 1 }", r"models.a.adapters\['sql'\]"),
    ],
)
def test_a_wrong_type_in_a_file_is_refused_by_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(TypeError, match=f"^{key} is "):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidRequestError, match=r"models.toml is not TOML: "):
        read(tmp_path, "budget =")
    (tmp_path / "models.toml").write_bytes(b"\xff")
    with pytest.raises(errors.InvalidRequestError, match=r"models.toml is not TOML"):
        PoolSettings.from_file(tmp_path / "models.toml")
    with pytest.raises(OSError, match=r"none.toml"):
        PoolSettings.from_file(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (PoolSettings, "budget_bytes", "24GiB"),
        (PoolSettings, "reserve_bytes", 1.5),
        (PoolSettings, "default", None),
        (PoolSettings, "default", LoadOptions()),
        (PoolSettings, "models", ["org/chat"]),
        (PoolSettings, "models", None),
        (PoolSettings, "min_residence_seconds", "5"),
        (ModelSettings, "options", None),
        (ModelSettings, "options", {"parallel": 2}),
        (ModelSettings, "priority", None),
        (ModelSettings, "priority", 1.5),
        (ModelSettings, "keep_alive_seconds", "5m"),
        (ModelSettings, "pinned", "yes"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_by_name(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{field} is "):
        kind(**{field: value})


def test_settings_of_models_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^models\['a'\] is "):
        PoolSettings(models={"a": None})  # type: ignore[dict-item]  # the point
    with pytest.raises(TypeError, match=r"^model is the path"):
        PoolSettings(models={1: ModelSettings()})  # type: ignore[dict-item]  # the point
    with pytest.raises(errors.InvalidRequestError, match="memory_override"):
        ModelSettings(options=LoadOptions(memory_override=True))


@pytest.mark.parametrize("kind", [AsyncRunnerPool, RunnerPool])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("settings", {"budget_bytes": 1}),
        ("settings", ModelSettings()),
        ("gate", lambda: 0),
        ("timeouts", 5),
        ("restart_policy", 3),
        ("env", {"A": 1}),
    ],
)
def test_a_pool_of_wrong_arguments_is_refused_by_name(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"model": Path("/models/a")}, "model"),
        ({"model": None}, "model"),
        ({"evict": "no"}, "evict"),
        ({"timeout_seconds": "5"}, "timeout_seconds"),
        ({"on_progress": 5}, "on_progress"),
    ],
)
async def test_wrong_arguments_are_refused_by_name(
    machine: Machine, arguments: dict[str, Any], name: str
) -> None:
    given = {"model": machine.model("a"), **arguments}
    model = given.pop("model")
    async with machine.pool() as pool:
        with pytest.raises(TypeError, match=f"^{name} is "):
            await pool.load(model, **given)
        with pytest.raises(TypeError, match=f"^{name} is "):
            async with pool.runner(model, **given):
                pass
        assert pool.models() == ()


@pytest.mark.parametrize("call", ["pin", "unpin", "evict"])
async def test_a_model_that_is_not_text_is_refused(machine: Machine, call: str) -> None:
    async with machine.pool() as pool:
        with pytest.raises(TypeError, match=r"^model is "):
            await getattr(pool, call)(["a"])
