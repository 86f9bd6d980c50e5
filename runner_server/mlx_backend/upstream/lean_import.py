"""Imports the part of mlx_lm that builds models, without what it has for other uses.

``mlx_lm.utils`` imports transformers for tokenizers and huggingface_hub for
downloads, and so does the package's ``__init__``: 1.3 s of a start, for two
functions that loading a model from a directory never calls. Here both modules are
imported when one of those functions is called, and ``__init__`` runs when a name of
the package itself is asked for. Nothing of mlx_lm is changed or left out:
whoever imports its other modules gets all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import resource
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_PACKAGE = "mlx_lm"
_TOKENIZERS = "mlx_lm.tokenizer_utils"
_HUB = "huggingface_hub"


def import_lean(name: str) -> ModuleType:
    """Imports a module of mlx_lm as ``importlib.import_module`` does, but lighter.

    Raises:
        ImportError: It cannot be imported at all.
    """
    if _PACKAGE in sys.modules and not _is_lazy(sys.modules[_PACKAGE]):
        return importlib.import_module(name)
    try:
        with _stand_ins():
            return importlib.import_module(name)
    except ImportError:
        # A release that takes other names from those modules; it starts slower.
        _forget_package()
        return importlib.import_module(name)


def forget_modules(package: str, kept: Collection[str]) -> None:
    """Drop a package's modules, so that their memory comes back; they can be imported again.

    Args:
        package: The package, which stays itself.
        kept: Names of modules that stay too.
    """
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        if name not in kept:
            del sys.modules[name]
            vars(sys.modules[package]).pop(name.rpartition(".")[2], None)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """While it is open, the modules that are not needed stand in ``sys.modules`` as shells."""
    sys.modules.setdefault(_PACKAGE, _lazy_package(_PACKAGE))
    shells = {_TOKENIZERS: _tokenizers_shell(), _HUB: _hub_shell()}
    placed = {name: shell for name, shell in shells.items() if name not in sys.modules}
    sys.modules.update(placed)
    sys.modules[resource.__name__] = _resource_shell()
    try:
        yield
    finally:
        sys.modules[resource.__name__] = resource
        for name in placed:
            del sys.modules[name]


def _tokenizers_shell() -> ModuleType:
    shell = ModuleType(_TOKENIZERS)
    # mlx_lm.utils names the class in annotations only.
    vars(shell).update(TokenizerWrapper=object, load=_deferred(_TOKENIZERS, "load"))
    return shell


def _hub_shell() -> ModuleType:
    shell = ModuleType(_HUB)
    vars(shell).update(snapshot_download=_deferred(_HUB, "snapshot_download"))
    return shell


def _resource_shell() -> ModuleType:
    """Return ``resource`` without its way to change limits.

    ``mlx_lm.utils`` sets that of open files to 2,048, at most 4,096, when it is imported. That
    raises where the process may not raise its limit (``ulimit -n 256``), and lowers it where it
    was higher, for a server that has a file for each connection.
    """
    shell = ModuleType(resource.__name__)
    vars(shell).update(vars(resource), setrlimit=lambda *_limits: None)
    return shell


def _deferred(module: str, name: str) -> Callable[..., Any]:
    """A function whose module is imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def _lazy_package(name: str) -> ModuleType:
    """A package whose ``__init__`` runs when a name that it defines is asked for.

    ``importlib.util.LazyLoader`` would run it at the import of any submodule.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def run_init(attribute: str) -> Any:
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package)["__getattr__"] = run_init
    return package


def _is_lazy(package: ModuleType) -> bool:
    return "__getattr__" in vars(package)


def _forget_package() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
