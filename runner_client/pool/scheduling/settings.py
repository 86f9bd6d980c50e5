"""Settings of a pool and of its models, from code or from a TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner_client.checks import (
    check_flag,
    check_integer,
    check_kind,
    check_model,
    check_number,
    refuse_type,
)
from runner_client.errors import InvalidRequestError
from runner_client.types import LoadOptions
from runner_common.contract import MAX_BYTES, MAX_PRIORITY
from runner_common.units import parse_bytes

if TYPE_CHECKING:
    from os import PathLike

_SIZE_FIELDS = frozenset(
    {"budget_bytes", "reserve_bytes", "memory_limit_bytes", "prefix_cache_bytes"}
)
"""Fields whose value in a file may be a size such as ``"8GiB"``, also without ``_bytes``."""

_MAX_SPARES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Settings of one model of a pool.

    Raises:
        TypeError: A value is of the wrong type.
        InvalidRequestError: A value is out of range.
    """

    options: LoadOptions = field(default_factory=LoadOptions)
    """Options of the load. ``memory_override`` is refused: a pool that overrides its own gate
    cannot keep a budget."""
    priority: int = 0
    """Models of higher priority load first and are evicted last. A level counts as much as
    ``PoolSettings.ageing_seconds`` of waiting. Range: -100 to 100."""
    keep_alive_seconds: float | None = 300.0
    """How long an idle model stays loaded; None, or ``inf`` in a file, keeps it until its memory is
    needed."""
    pinned: bool = False
    """Whether the model is never evicted to make room, nor after ``keep_alive_seconds``."""

    def __post_init__(self) -> None:
        _require_kind("options", self.options, LoadOptions)
        if self.priority is None:
            refuse_type("priority", None, "a whole number")
        check_integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        check_flag("pinned", self.pinned)
        if self.keep_alive_seconds not in (None, math.inf):
            _require_seconds("keep_alive_seconds", self.keep_alive_seconds)
        if self.options.memory_override:
            _refuse("memory_override", "a pool keeps its budget: the gate cannot be overridden")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Settings of a pool.

    Raises:
        TypeError: A value is of the wrong type.
        InvalidRequestError: A value is out of range.
    """

    budget_bytes: int | None = None
    """The most memory that all runners of the pool may take together: weights, KV caches, prefix
    caches, working memory and the processes themselves. Default: whatever the machine can give,
    measured before each load. The machine's free memory is a limit in either case."""
    default: ModelSettings = field(default_factory=ModelSettings)
    """Settings of models that ``models`` does not list."""
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    """Settings by model, a directory or hub id as in ``AsyncRunnerPool.runner``."""
    min_residence_seconds: float = 1.0
    """A model is not evicted to make room within this time after its load, nor within the time that
    its load took."""
    max_wait_seconds: float = 30.0
    """A model that has waited this long for memory gets the memory of models in use: they finish
    the leases they have, and new ones wait. Until then, requests of a loaded model are served
    without regard to models that wait."""
    ageing_seconds: float = 10.0
    """The waiting time that counts as much as one level of priority."""
    return_seconds: float = 5.0
    """How long to wait for the memory of an evicted runner before it is reported as missing."""
    reserve_bytes: int | None = None
    """Free memory below which the pool gives memory back: it empties prefix caches first, then
    evicts idle models. Default: the headroom of the gate."""
    spare_processes: int = 0
    """How many runners to keep started without a model, so that a load needs no new process. Each
    saves about 0.3 s of a load and takes about 100 MiB, within the budget, as long as nothing in
    the pool needs that memory. The default is none: other programs and pools of the machine do not
    get this memory, and a load of several seconds gains little. Range: 0 to 16."""

    def __post_init__(self) -> None:
        check_integer("budget_bytes", self.budget_bytes, 1, MAX_BYTES)
        check_integer("reserve_bytes", self.reserve_bytes, 0, MAX_BYTES)
        if self.spare_processes is None:
            refuse_type("spare_processes", None, "a whole number")
        check_integer("spare_processes", self.spare_processes, 0, _MAX_SPARES)
        _require_kind("default", self.default, ModelSettings)
        if not isinstance(self.models, Mapping):
            refuse_type("models", self.models, "a mapping from models to ModelSettings")
        for name, settings in self.models.items():
            check_model(name)
            _require_kind(f"models[{name!r}]", settings, ModelSettings)
        for name in ("min_residence_seconds", "max_wait_seconds", "return_seconds"):
            _require_seconds(name, getattr(self, name))
        _require_seconds("ageing_seconds", self.ageing_seconds, is_positive=True)

    def of(self, model: str) -> ModelSettings:
        """Return the settings of a model."""
        return self.models.get(model, self.default)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> PoolSettings:
        """Read the settings from a TOML file.

        ::

            budget = "24GiB"
            max_wait_seconds = 20

            [default]
            keep_alive_seconds = 600

            [models."org/model"]
            context_length = 8192
            parallel = 8
            prefix_cache = "1GiB"
            pinned = true

        Keys are the fields of ``PoolSettings``, ``ModelSettings`` and ``LoadOptions``. A size may
        be text, and its key may omit ``_bytes``. A model starts from the values of ``default``.

        Raises:
            OSError: The file cannot be read.
            InvalidRequestError: The file is not TOML, or a key or a value is wrong.
            TypeError: A value is of the wrong type.
        """
        with Path(path).open("rb") as file:
            try:
                table = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise InvalidRequestError(f"{path} is not TOML: {error}") from error
        values = _known(table, _names(cls), "")
        default = _model(ModelSettings(), _table(values.pop("default", {}), "default"), "default")
        models = {
            name: _model(default, _table(entry, f"models.{name}"), f"models.{name}")
            for name, entry in _table(values.pop("models", {}), "models").items()
        }
        return cls(default=default, models=models, **values)


def _model(base: ModelSettings, table: Mapping[str, Any], where: str) -> ModelSettings:
    """Return ``base`` with the values of a table."""
    known = (_names(ModelSettings) | _names(LoadOptions)) - {"options"}
    values = _known(table, known, where)
    own = {name: value for name, value in values.items() if name in _names(ModelSettings)}
    load = {name: value for name, value in values.items() if name not in own}
    try:
        return replace(base, options=replace(base.options, **load), **own)
    except InvalidRequestError as error:
        violations = [(f"{where}.{field}", text) for field, text in error.field_violations]
        raise InvalidRequestError(f"{where}.{error}", field_violations=violations) from None
    except TypeError as error:
        raise TypeError(f"{where}.{error}") from None


def _known(table: Mapping[str, Any], known: frozenset[str], where: str) -> dict[str, Any]:
    """Return a table with the names of fields as keys, and sizes as numbers."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{key}_bytes" if f"{key}_bytes" in _SIZE_FIELDS else key
        path = f"{where}.{key}" if where else key
        if name not in known:
            _refuse(path, f"there is no such setting; known are {', '.join(sorted(known))}")
        if name in values:
            _refuse(path, f"is given twice, also as {name}")
        values[name] = _size(path, value) if name in _SIZE_FIELDS else value
    return values


def _size(path: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except ValueError as error:
        _refuse(path, str(error))


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, "must be a table")
    return value


def _names(kind: type) -> frozenset[str]:
    return frozenset(each.name for each in fields(kind))


def _require_kind(name: str, value: object, kind: type) -> None:
    if value is None:
        refuse_type(name, value, f"an object of the class {kind.__name__}")
    check_kind(name, value, kind)


def _require_seconds(name: str, value: float | None, *, is_positive: bool = False) -> None:
    check_number(name, value)
    if value is None or not 0 <= value < math.inf or (is_positive and value == 0):
        _refuse(name, f"must be a number of seconds, {'above' if is_positive else 'at least'} 0")


def _refuse(name: str, text: str) -> NoReturn:
    raise InvalidRequestError(f"{name}: {text}", field_violations=[(name, text)])
