"""A draft model changes the speed of a row, and never its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapter.test_constraints import KINDS, matcher, row
from adapter.test_drafts import SAMPLINGS
from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.backend import LoadedModel, Matcher
from runner_server.engine.types import CachePolicy, Constraint, LoadSpec, Sampling, Token
from runner_server.engine.work import DecodeItem, DraftPrefillItem, PrefillItem, PromptChunk
from runner_server.errors import InvalidField, ModelNotFound, ModelUnsupported, RunnerFault
from support.adapters import write_adapter
from support.draft_models import DEMO, noisy, with_another_token
from support.harness import Server, eventually, failure, running, tokens
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY, Row, run_alone, run_together
from tools.local_batch import start_alone

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend

COUNT = 40
TEXT = "class Stream:\n    def read(self, size):\n        return self.file.read(size)\n\n"


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model that is often right."""
    return noisy(tmp_path_factory.mktemp("draft") / "alike", 0.15)


@pytest.fixture(scope="module")
def drafted(load: Callable[..., LoadedModel], alike: Path) -> LoadedModel:
    """The demo model with a draft model that is often right."""
    return load(DEMO, parallel=4, draft_model=str(alike))


def _decode(
    model: LoadedModel,
    prompt: Sequence[int],
    sampling: Sampling,
    counts: Iterator[int],
    count: int,
    own: Matcher | None = None,
) -> tuple[list[Token], int]:
    """Decode a row, each step of which checks as many proposed tokens as ``counts`` says.

    Returns:
        The tokens, and the number of proposed ones that were checked.
    """
    executor = start_alone(model, prompt, sampling, own)
    events = [*executor.run(DecodeItem(joining=(0,))).events]
    half = len(prompt) // 2
    for start in (0, half):
        executor.run(DraftPrefillItem(0, start, half))
    checked = 0
    while len(events) < count:
        report = executor.run(DecodeItem(proposed=next(counts)))
        events += report.events
        checked += report.drafted
    executor.close()
    return [event for event in events if isinstance(event, Token)][:count], checked


def _counts() -> Iterator[int]:
    """Yield numbers of tokens to propose, some of them 0."""
    while True:
        yield from (4, 0, 2, 16, 0, 0, 3, 1)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_proposed_tokens_leave_the_text_as_it_is(
    trained: LoadedModel, drafted: LoadedModel, sampling: Sampling
) -> None:
    prompt = trained.codec.encode(TEXT, as_prompt=True)
    plain = Row(prompt, COUNT, sampling)
    run_together(trained, [plain])
    own, checked = _decode(drafted, prompt, sampling, _counts(), COUNT)
    assert 0 < sum(token.is_drafted for token in own) < checked
    if sampling.logprobs is None:
        assert [token.token_id for token in own] == plain.ids
    else:
        assert_logprobs_close([each.logprob for each in own if each.logprob], plain.logprobs)


@pytest.mark.parametrize("constraint", KINDS, ids=lambda each: each.kind)
def test_constraints_apply_to_each_proposed_token(
    trained: LoadedModel, drafted: LoadedModel, constraint: Constraint
) -> None:
    plain = row(trained, constraint, Sampling(seed=2, top_k=0, top_p=1.0))
    run_together(trained, [plain])
    own = matcher(drafted, constraint)
    found, _ = _decode(drafted, plain.prompt, plain.sampling, _counts(), len(plain.ids), own)
    assert [token.token_id for token in found] == plain.ids


def test_a_draft_model_equal_to_its_target_is_always_right(
    load: Callable[..., LoadedModel],
) -> None:
    """Also after it has been ahead of the text, and behind it."""
    model = load(DEMO, parallel=1, draft_model=str(DEMO))
    prompt = model.codec.encode(TEXT, as_prompt=True)
    own, checked = _decode(model, prompt, GREEDY, _counts(), COUNT)
    accepted = sum(token.is_drafted for token in own)
    # The last draft goes on after the last token.
    assert checked - accepted <= 16
    assert accepted > COUNT / 2


def test_another_row_may_join_and_leave_between_proposals(
    trained: LoadedModel, drafted: LoadedModel
) -> None:
    prompt = trained.codec.encode(TEXT, as_prompt=True)
    expected = [run_alone(trained, Row(prompt, 60)), run_alone(trained, Row(prompt[5:], 6))]
    executor = start_alone(drafted, prompt, GREEDY)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    accepted = 0

    def run(item: DecodeItem) -> None:
        nonlocal accepted
        for event in executor.run(item).events:
            assert isinstance(event, Token)
            tokens[event.row].append(event.token_id)
            accepted += event.is_drafted

    run(DecodeItem(joining=(0,)))
    executor.run(DraftPrefillItem(0, 0, len(prompt)))
    for _ in range(3):
        run(DecodeItem(proposed=4))
    executor.add(1, prompt[5:], GREEDY, CachePolicy(writes=False))
    executor.run(PrefillItem((PromptChunk(1, 0, len(prompt) - 6, is_stored=False),)))
    run(DecodeItem(joining=(1,)))
    while len(tokens[1]) < 6:
        run(DecodeItem())
    executor.remove([1])
    while len(tokens[0]) < 60:
        run(DecodeItem(proposed=4))
    executor.close()
    assert [tokens[0][:60], tokens[1]] == expected
    assert accepted > 3


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)], ids=["greedy", "sampled"])
def test_other_rows_may_join_and_leave(
    trained: LoadedModel, drafted: LoadedModel, sampling: Sampling
) -> None:
    prompt = trained.codec.encode(TEXT, as_prompt=True)
    expected = [
        run_alone(trained, Row(prompt, 80, sampling)),
        run_alone(trained, Row(prompt[5:], 4, sampling)),
    ]
    for late in (3, 9, 20):
        rows = [
            Row(prompt, 80, sampling, may_be_drafted=True),
            Row(prompt[5:], 4, sampling, late=late, may_be_drafted=True),
        ]
        assert run_together(drafted, rows) == expected


def test_a_row_may_be_preempted_after_a_proposal(
    trained: LoadedModel, drafted: LoadedModel
) -> None:
    prompt = trained.codec.encode(TEXT, as_prompt=True)
    ids = run_alone(trained, Row(prompt, 30))
    executor = start_alone(drafted, prompt, GREEDY)
    events = [*executor.run(DecodeItem(joining=(0,))).events]
    executor.run(DraftPrefillItem(0, 0, len(prompt)))
    while len(events) < 30:
        events += executor.run(DecodeItem(proposed=3)).events
        executor.preempt(0)
        events += executor.run(DecodeItem(joining=(0,))).events
    executor.close()
    assert [event.token_id for event in events if isinstance(event, Token)][:30] == ids


def test_the_draft_model_may_begin_in_the_middle_of_a_text(
    trained: LoadedModel, drafted: LoadedModel
) -> None:
    prompt = trained.codec.encode(TEXT * 4, as_prompt=True)
    executor = start_alone(drafted, prompt, GREEDY)
    events = [*executor.run(DecodeItem(joining=(0,))).events]
    executor.run(DraftPrefillItem(0, 0, 8))
    executor.run(DraftPrefillItem(0, len(prompt) - 40, 20))
    executor.run(DraftPrefillItem(0, len(prompt) - 20, 20))
    while len(events) < 20:
        events += executor.run(DecodeItem(proposed=3)).events
    executor.close()
    ids = [event.token_id for event in events if isinstance(event, Token)]
    assert ids[:20] == run_alone(trained, Row(prompt, 20))


def _refused(backend: MlxBackend, path: Path, **spec: Any) -> RunnerFault:
    with pytest.raises(RunnerFault) as caught:
        backend.load(LoadSpec(str(path), parallel=1, **spec), lambda _: None)
    return caught.value


def test_other_tokens_are_refused_with_the_first_that_differs(
    backend: MlxBackend, tmp_path: Path
) -> None:
    other = with_another_token(tmp_path / "other")
    fault = _refused(backend, DEMO, draft_model=str(other))
    assert isinstance(fault, ModelUnsupported)
    assert "1 ids differ, such as 2047, which is 'zzzzzzzz'" in str(fault)
    assert fault.metadata["model"] == str(other)


@pytest.mark.parametrize("shape", ["gemma3", "mamba2"])
def test_caches_that_cannot_be_cut_back_are_refused(
    backend: MlxBackend, model_dir: Callable[..., Path], shape: str
) -> None:
    llama = str(model_dir("llama"))
    fault = _refused(backend, model_dir(shape), draft_model=llama)
    assert isinstance(fault, InvalidField)
    assert fault.violations[0][0] == "draft_model"
    other = _refused(backend, Path(llama), draft_model=str(model_dir(shape)))
    assert isinstance(other, ModelUnsupported)
    assert "cannot be cut back" in str(other)


def test_a_missing_draft_model_is_refused_before_the_load(backend: MlxBackend) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        backend.check(LoadSpec(str(DEMO), draft_model="/nowhere/at/all"))


def test_ranks_refuse_it_by_name() -> None:
    shard: Any = object()
    with pytest.raises(InvalidField) as caught:
        MlxBackend(shard=shard).check(LoadSpec(str(DEMO), draft_model=str(DEMO)))
    assert [field for field, _ in caught.value.violations] == ["draft_model"]


def test_its_memory_counts(load: Callable[..., LoadedModel], alike: Path) -> None:
    alone = load(DEMO, parallel=1, context_length=512).info
    model = load(DEMO, parallel=1, context_length=512, draft_model=str(alike))
    info = model.info
    assert info.draft
    assert info.draft.weight_bytes == info.weight_bytes == alone.weight_bytes
    assert info.draft.context_length == 512
    more = info.weight_bytes + model.kv_bytes(512)
    assert info.limit_bytes == alone.limit_bytes + more
    assert info.kv_budget_bytes == alone.kv_budget_bytes
    with pytest.raises(RunnerFault, match="draft model"):
        load(
            DEMO, parallel=1, memory_limit_bytes=3 * info.weight_bytes // 2, draft_model=str(alike)
        )


OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "repeat_penalty": 1.2, "repeat_last_n": -1},
)


@pytest.fixture
def endless_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the draft model propose in every step, however much time that takes."""
    module = "runner_server.engine.speculation.model_drafting"
    for name in ("_TRIAL_STEPS", "_MOST_SAVED_STEPS", "FIRST_CREDIT", "MOST_CREDIT"):
        monkeypatch.setattr(f"{module}.{name}", 1e9)
    monkeypatch.setattr(f"{module}._WORTH", 1e-9)


@pytest.mark.usefixtures("endless_credit")
@pytest.mark.parametrize(("kv_bits", "adapter"), [(0, ""), (8, "small")], ids=["plain", "all"])
async def test_a_seed_gives_the_text_that_it_gives_without_a_draft_model(
    socket_dir: Path, alike: Path, tmp_path: Path, kv_bits: int, adapter: str
) -> None:
    """Alone, after a completion that was cancelled, with a prefix from the cache, and together."""
    backend: Any = MlxBackend()
    fields: dict[str, Any] = {"parallel": 2, "kv_bits": kv_bits}
    if adapter:
        path = write_adapter(tmp_path / adapter, DEMO, scale=0.2)
        fields["adapters"] = [pb.Adapter(name=adapter, path=str(path))]
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)

        async def answer(options: dict[str, Any]) -> list[pb.CompletionResponse]:
            options = {"num_predict": 80, "ignore_eos": True, **options}
            return await server.complete(TEXT, adapter=adapter, **options)

        await server.load(str(DEMO), **fields)
        expected = [tokens(await answer(options)) for options in OPTIONS]
        loaded = await server.load(str(DEMO), draft_model=str(alike), **fields)
        assert loaded.model.draft_model.path == str(alike)
        call = server.start(TEXT, num_predict=500, ignore_eos=True, adapter=adapter)
        async for message in call:
            if message.token_ids:
                break
        call.cancel()
        await eventually(lambda: not server.view.requests)
        alone = [await answer(options) for options in OPTIONS]
        assert [tokens(messages) for messages in alone] == expected
        together = await asyncio.gather(*map(answer, OPTIONS))
        assert [tokens(messages) for messages in together] == expected
    for messages in alone:
        assert 0 < messages[-1].draft_accepted_count < messages[-1].drafted_count
    assert alone[-1][-1].prompt_cached_count


async def test_a_server_without_drafts_refuses_it_by_name(socket_dir: Path, alike: Path) -> None:
    backend: Any = MlxBackend()
    async with running(socket_dir, backend, draft_tokens=0) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        problem = await failure(server.load(str(DEMO), draft_model=str(alike)))
    assert list(problem.violations) == ["draft_model"]


def test_a_draft_model_is_freed_with_its_target(backend: MlxBackend, alike: Path) -> None:
    backend.release()
    before = backend.memory().held_bytes
    model = backend.load(LoadSpec(str(DEMO), draft_model=str(alike)), lambda _: None)
    assert backend.memory().held_bytes > before + model.info.weight_bytes
    del model
    backend.release()
    assert backend.memory().held_bytes <= before + 2**16
