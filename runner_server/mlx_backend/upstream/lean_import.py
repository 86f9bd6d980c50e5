"""Import of the model-building part of mlx_lm without its heavy dependencies.

``mlx_lm.utils`` imports transformers for tokenizers and huggingface_hub for downloads, and so does
``mlx_lm/__init__.py``. These imports take 1.3 s at startup, for two functions that a load from a
directory does not call. This module defers both imports to the first call of those functions, and
``__init__`` to the first access to a name of the package. mlx_lm itself is not changed, and its
other modules are imported as usual.
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
    """Import a module of mlx_lm like ``importlib.import_module``, but faster.

    For ``import_lean("mlx_lm.utils")``:

    1. ``sys.modules`` gets a lazy ``mlx_lm``, whose ``__init__`` has not run, and placeholders for
       ``mlx_lm.tokenizer_utils`` and ``huggingface_hub``, which define only the names that
       ``mlx_lm.utils`` takes from them.
    2. ``mlx_lm.utils`` is imported. Its ``from .tokenizer_utils import load`` finds the
       placeholder, so transformers is not imported.
    3. The placeholders are removed from ``sys.modules``. The lazy ``mlx_lm`` stays, and runs
       ``__init__`` on the first access to, say, ``mlx_lm.generate``.
    4. ``mlx_lm.utils`` keeps the placeholder's function. Each call imports the real module, if it
       has not been imported yet, and calls the real function.

    If step 2 raises ``ImportError``, because a release of mlx_lm takes other names from those
    modules, mlx_lm is imported as usual. So is every module once the real ``__init__`` has run.

    Raises:
        ImportError: The module cannot be imported as usual either.
    """
    if _PACKAGE in sys.modules and not _is_lazy(sys.modules[_PACKAGE]):
        return importlib.import_module(name)
    try:
        with _stand_ins():
            return importlib.import_module(name)
    except ImportError:
        # This release takes other names from the placeholders: import everything.
        _forget_package()
        return importlib.import_module(name)


def forget_modules(package: str, kept: Collection[str]) -> None:
    """Drop a package's submodules from ``sys.modules`` to free their memory; a later import works.

    Args:
        package: The package, which stays imported.
        kept: Names of submodules that stay imported too.
    """
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        if name not in kept:
            del sys.modules[name]
            vars(sys.modules[package]).pop(name.rpartition(".")[2], None)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put placeholders for the heavy modules into ``sys.modules`` within the context."""
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
    """Return a copy of ``resource`` whose ``setrlimit`` does nothing.

    ``mlx_lm.utils`` sets the limit of open files to 2,048, at most 4,096, when it is imported. This
    fails with an exception if the process may not raise its limit (``ulimit -n 256``), and
    otherwise lowers a higher limit, although a server needs a descriptor for each connection.
    """
    shell = ModuleType(resource.__name__)
    vars(shell).update(vars(resource), setrlimit=lambda *_limits: None)
    return shell


def _deferred(module: str, name: str) -> Callable[..., Any]:
    """Return a stand-in for a function of a module imported at the first call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def _lazy_package(name: str) -> ModuleType:
    """Return a package whose ``__init__`` runs at the first access to one of its names.

    ``importlib.util.LazyLoader`` would run ``__init__`` at the import of any submodule.
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
