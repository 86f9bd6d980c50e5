"""The prefix cache on disk with real models: the same text after a load as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.prefix_disk import BLOCK_TOKENS, PrefixDiskSettings
from runner_server.engine.types import CachePolicy, LoadSpec, NotFinite, Sampling, Token
from runner_server.errors import ShuttingDown
from runner_server.mlx_backend import MlxBackend
from support.prefix_bench import random_prompt
from support.rows import GREEDY
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.cache.blocks import BlockCodec  # noqa: E402
from runner_server.mlx_backend.cache.row_caches import CachePieces  # noqa: E402

SEEDED = replace(GREEDY, temperature=1.0, seed=7)
DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
PLENTY = 1 << 30
LENGTH = 5 * BLOCK_TOKENS + 50
WHOLE = 5 * BLOCK_TOKENS
"""Tokens of a prompt of ``LENGTH`` that are in whole blocks."""


class Loads:
    """Loads of models with one directory; each has an empty prefix cache in memory."""

    def __init__(self, backend: MlxBackend, directory: Path, budget: int = PLENTY) -> None:
        self._backend = backend
        self.settings = PrefixDiskSettings(directory, budget)
        self.report: Callable[[int], None] = lambda _progress: None

    @contextmanager
    def load(self, path: Path, **spec: Any) -> Iterator[Any]:
        """Load a model for the time of a context, as an engine's load and unload would."""
        self._backend._disk = self.settings
        try:
            model = self._backend.load(
                LoadSpec(str(path), **{"context_length": 2048, **spec}), self.report
            )
        finally:
            self._backend._disk = None
        try:
            yield model
        finally:
            model.close()

    @property
    def files(self) -> list[Path]:
        """The blocks in the directory."""
        return sorted(self.settings.directory.glob("*.kv"))


@pytest.fixture
def loads(backend: MlxBackend, tmp_path: Path) -> Loads:
    """Loads with an empty directory."""
    return Loads(backend, tmp_path / "prefixes")


def run_row(
    model: Any,
    prompt: Sequence[int],
    sampling: Sampling = GREEDY,
    policy: CachePolicy | None = None,
    adapter: str = "",
) -> tuple[list[int], int]:
    """Return the first tokens, and how many of the prompt were cached."""
    batch, cached = LocalBatch.of(model), 0
    ids: list[int] = []
    batch.add(0, prompt, sampling, policy, adapter=adapter)
    while len(ids) < 8:
        for event in batch.step():
            if isinstance(event, Token):
                ids.append(event.token_id)
            else:
                cached = getattr(event, "cached", cached)
    batch.remove([0])
    batch.close()
    return ids, cached


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_text_is_the_same_after_another_load(loads: Loads, sampling: Sampling) -> None:
    # Trained weights, because those of random ones have near-ties.
    prompt, spec = random_prompt(900, 1), {"context_length": 1024, "prefix_cache_bytes": 64 << 20}
    with loads.load(DEMO, **spec) as model:
        first, cached = run_row(model, prompt, sampling)
        assert (cached, model.info.warnings) == (0, ())
    with loads.load(DEMO, **spec) as model:
        assert run_row(model, prompt, sampling) == (first, 896)
        counters = model.disk_counters
    assert counters.written_bytes == 0
    assert counters.read_bytes > 0


def test_loads_with_other_kv_bits_share_no_blocks(loads: Loads) -> None:
    prompt, spec = random_prompt(300, 1), {"context_length": 1024, "prefix_cache_bytes": 64 << 20}
    texts = {}
    for bits in (8, 0, 4):
        with loads.load(DEMO, kv_bits=bits, **spec) as model:
            texts[bits], cached = run_row(model, prompt, SEEDED)
            assert (cached, model.info.warnings) == (0, ())
    for bits, text in texts.items():
        with loads.load(DEMO, kv_bits=bits, **spec) as model:
            assert run_row(model, prompt, SEEDED) == (text, 256)


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({}, {}),
        ({"num_key_value_heads": 1}, {}),
        ({"num_key_value_heads": 4, "head_dim": 32}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "float16"}),
    ],
    ids=["plain", "one head", "bfloat16", "float16"],
)
def test_keys_and_values_come_back_bit_by_bit(
    backend: MlxBackend,
    model_dir: Callable[..., Path],
    changes: dict[str, int],
    spec: dict[str, str],
) -> None:
    from runner_server.engine.types import Dtype

    dtype = Dtype(spec.get("dtype", "float32"))
    model: Any = backend.load(LoadSpec(str(model_dir(**changes)), dtype=dtype), lambda _: None)
    pieces = CachePieces.of(model._model)
    codec = BlockCodec(model._model, pieces)
    caches = pieces.new()
    model._model(mx.array([random_prompt(BLOCK_TOKENS + 9, 1)]), cache=caches)
    parts = [pieces.segment(caches, 9, 40), pieces.segment(caches, 40, BLOCK_TOKENS + 9)]
    payload = codec.encode(parts)
    assert payload is not None
    assert len(payload) == codec.block_bytes
    whole = pieces.segment(caches, 9, BLOCK_TOKENS + 9)
    for pair, expected in zip(codec.decode(bytearray(payload)), whole, strict=True):
        assert pair
        assert expected
        for part, other in zip(pair, expected, strict=True):
            assert (part.dtype, part.shape) == (other.dtype, other.shape)
            assert mx.array_equal(part, other).item()
    assert str(dtype.value) in codec.layout


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_not_encoded(
    backend: MlxBackend, model_dir: Callable[..., Path], bad: float
) -> None:
    model: Any = backend.load(LoadSpec(str(model_dir())), lambda _progress: None)
    pieces = CachePieces.of(model._model)
    codec = BlockCodec(model._model, pieces)
    caches = pieces.new()
    model._model(mx.array([random_prompt(BLOCK_TOKENS, 1)]), cache=caches)
    segment: Any = pieces.segment(caches, 0, BLOCK_TOKENS)
    assert codec.encode([segment]) is not None
    keys, values = segment[1]
    values[0, 1, 77, 3] = bad
    segment[1] = keys, values
    assert codec.encode([segment]) is None


def test_nothing_of_a_prompt_that_failed_stays_on_disk(
    loads: Loads, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model_dir(tie_word_embeddings=False), tmp_path / "model"))
    weights = dict(mx.load(str(path / "model.safetensors")))
    (name,) = (name for name in weights if "embed" in name)
    weights[name][300] = mx.nan
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    sound = [token % 300 for token in random_prompt(LENGTH, 6)]
    with loads.load(path) as model:
        batch = LocalBatch.of(model)
        batch.add(0, [*sound[:300], 300, *sound], GREEDY)
        failed = False
        while not failed:
            failed = any(isinstance(event, NotFinite) for event in batch.step())
            while model.save_prefixes(is_idle=True):
                pass
        assert loads.files
        batch.remove([0])
        batch.close()
    assert not loads.files
    with loads.load(path) as model:
        run_row(model, sound)
    assert len(loads.files) == WHOLE // BLOCK_TOKENS


def test_a_copy_that_fails_costs_no_request(
    loads: Loads, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> bytes:
        raise RuntimeError("[malloc] Unable to allocate")

    with loads.load(model_dir()) as model:
        with monkeypatch.context() as patch:
            patch.setattr(model._disk._ops, "encode", fail)
            run_row(model, random_prompt(LENGTH, 7))
            assert not model.save_prefixes(is_idle=True)
        assert not loads.files
        run_row(model, random_prompt(LENGTH, 8))
    assert len(loads.files) == WHOLE // BLOCK_TOKENS


def test_salts_and_bypass_are_kept_apart(loads: Loads, model_dir: Callable[..., Path]) -> None:
    prompt, path = random_prompt(LENGTH, 2), model_dir()
    with loads.load(path) as model:
        run_row(model, prompt, policy=CachePolicy(writes=False))
    assert not loads.files
    with loads.load(path) as model:
        run_row(model, prompt, policy=CachePolicy(salt="one"))
    assert len(loads.files) == WHOLE // BLOCK_TOKENS
    with loads.load(path) as model:
        policies = [
            CachePolicy(writes=False),
            CachePolicy(writes=False, salt="two"),
            CachePolicy(reads=False, writes=False, salt="one"),
            CachePolicy(salt="one"),
        ]
        cached = [run_row(model, prompt, policy=policy)[1] for policy in policies]
    assert cached == [0, 0, 0, WHOLE]


# -- whose entries they are ------------------------------------------------------


def _changed_weights(path: Path) -> None:
    """Change one weight, and nothing that a listing would show but the time."""
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content)


def _changed_theta(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 20000.0}))


def _same_files(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    shutil.rmtree(path)
    copy.rename(path)


@pytest.mark.parametrize(
    ("change", "spec", "expected"),
    [
        (_same_files, {}, WHOLE),
        (_changed_weights, {}, 0),
        (_changed_theta, {}, 0),
        (lambda _path: None, {"dtype": "bfloat16"}, 0),
    ],
    ids=["the same files", "other weights", "another configuration", "another dtype"],
)
def test_only_the_same_model_finds_its_entries(
    loads: Loads,
    model_dir: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[Path], None],
    spec: dict[str, str],
    expected: int,
) -> None:
    from runner_server.engine.types import Dtype

    path = tmp_path / "model"
    shutil.copytree(model_dir(), path)
    prompt = random_prompt(LENGTH, 3)
    with loads.load(path) as model:
        run_row(model, prompt)
    change(path)
    dtype = {name: Dtype(value) for name, value in spec.items()}
    with loads.load(path, **dtype) as model:
        assert run_row(model, prompt)[1] == expected


def test_the_digest_of_unchanged_files_is_remembered(
    loads: Loads, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompt = model_dir(), random_prompt(LENGTH, 4)
    with loads.load(path) as model:
        run_row(model, prompt)
    monkeypatch.setattr(
        "runner_server.mlx_backend.loading.model_digest.DigestedFiles._compute",
        lambda _self, _beat: "0" * 64,
    )
    with loads.load(path) as model:
        assert run_row(model, prompt)[1] == WHOLE
    (digest,) = loads.settings.directory.glob("*.digest")
    digest.write_text("damaged")
    with loads.load(path) as model:
        assert run_row(model, prompt)[1] == 0


def test_reading_the_files_is_progress_and_can_be_cancelled(
    loads: Loads, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    part_bytes = 1 << 16
    monkeypatch.setattr("runner_server.mlx_backend.loading.model_digest._PART_BYTES", part_bytes)
    parts = (model_dir() / "model.safetensors").stat().st_size // part_bytes
    seen: list[int] = []

    def report(progress: int) -> None:
        seen.append(progress)
        if seen.count(99) == 3:
            raise ShuttingDown("the load was cancelled")

    loads.report = report
    with pytest.raises(ShuttingDown), loads.load(model_dir()):
        pass
    assert parts > seen.count(99) == 3
    assert not [*loads.settings.directory.glob("*.digest")]


def test_a_model_with_prefixes_on_disk_is_freed(
    loads: Loads, backend: MlxBackend, model_dir: Callable[..., Path]
) -> None:
    backend.release()
    before = mx.get_active_memory()
    prompt = random_prompt(LENGTH, 9)
    for _ in range(2):
        with loads.load(model_dir()) as model:
            run_row(model, prompt)
            assert backend.memory().disk is not None
        del model
        backend.release()
        assert backend.memory().disk is None
        assert mx.get_active_memory() <= before + 50_000


# -- when it cannot be used ------------------------------------------------------


def _warning(model: Any) -> str:
    (warning,) = [text for text in model.info.warnings if "prefix cache on disk" in text]
    return str(warning)


@pytest.mark.parametrize(
    ("shape", "name"), [("gemma3", "RotatingKVCache"), ("mamba2", "ArraysCache")]
)
def test_caches_that_cannot_be_cut_are_refused_by_name(
    loads: Loads, model_dir: Callable[..., Path], shape: str, name: str
) -> None:
    with loads.load(model_dir(shape)) as model:
        assert name in _warning(model)
        run_row(model, random_prompt(BLOCK_TOKENS + 2, 5))
    assert not loads.files


def test_a_directory_open_to_others_is_not_used(
    loads: Loads, model_dir: Callable[..., Path]
) -> None:
    loads.settings.directory.mkdir(mode=0o755)
    loads.settings.directory.chmod(0o755)
    with loads.load(model_dir()) as model:
        assert "is open to other users (mode 0755)" in _warning(model)
        run_row(model, random_prompt(LENGTH, 5))
    assert not [*loads.settings.directory.iterdir()]


def test_a_path_that_is_no_directory_is_not_used(
    loads: Loads, model_dir: Callable[..., Path]
) -> None:
    loads.settings.directory.write_text("a file")
    with loads.load(model_dir()) as model:
        assert "File exists" in _warning(model)
        run_row(model, random_prompt(50, 5))


@pytest.mark.parametrize(
    ("budget", "memory", "text"),
    [(PLENTY, 0, "the prefix cache in memory has 0 B"), (1000, 1 << 20, "of one block")],
)
def test_budgets_too_small_for_a_block_are_named(
    loads: Loads, model_dir: Callable[..., Path], budget: int, memory: int, text: str
) -> None:
    loads.settings = replace(loads.settings, budget_bytes=budget)
    with loads.load(model_dir(), prefix_cache_bytes=memory) as model:
        assert text in _warning(model)
        run_row(model, random_prompt(50, 5))


def test_blocks_in_transit_are_within_the_budget_of_memory(
    loads: Loads, backend: MlxBackend, model_dir: Callable[..., Path]
) -> None:
    with loads.load(model_dir(), prefix_cache_bytes=1 << 20) as model:
        block = model._disk._ops.block_bytes
        assert model.info.prefix_cache_bytes == model.prompts.limit_bytes == (1 << 20) - 4 * block
    # The default is larger by that much.
    plain: Any = backend.load(LoadSpec(str(model_dir()), context_length=2048), lambda _: None)
    with loads.load(model_dir()) as model:
        assert model.info.prefix_cache_bytes == plain.info.prefix_cache_bytes
        assert model.info.reserved_bytes == plain.info.reserved_bytes + 4 * block
