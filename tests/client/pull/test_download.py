"""Downloads from a stand-in of the hub: what is fetched, resumed, verified and refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from runner_client.errors import ModelNotFoundError, ModelUnsupportedError
from runner_client.pull.errors import PullError
from runner_client.pull.plan import PullPlan, planned
from runner_common.model_directory import locate
from support.hub import StandInHub, digest

WEIGHTS = "model.safetensors"
CUT = 1_500_000
FOLDER = "models--org--demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder for a cache and the skeletons of plans."""
    return tmp_path


def _plan(hub: StandInHub, folder: Path, revision: str | None = None) -> PullPlan:
    skeleton = folder / f"plan-{len(list(folder.iterdir()))}"
    skeleton.mkdir()
    return planned("org/demo", revision, folder / "hub", skeleton, hub.url)


def _pull(hub: StandInHub, folder: Path, revision: str | None = None) -> Path:
    return _plan(hub, folder, revision).run(lambda _percent: None)


def _located(folder: Path, name: str = "org/demo") -> Path:
    return locate(name, {"HF_HUB_CACHE": str(folder / "hub")}).path


def _partial(hub: StandInHub, folder: Path) -> Path:
    files = next(iter(hub.trees.values()))
    name = digest(WEIGHTS, files[WEIGHTS])
    return folder / "hub" / FOLDER / "blobs" / f"{name}.incomplete"


def test_a_pulled_model_is_where_other_commands_look(hub: StandInHub, folder: Path) -> None:
    path = _pull(hub, folder)
    files = hub.trees[hub.revisions["main"]]
    read = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    assert read == {name: data for name, data in files.items() if name != "LICENSE"}
    assert _located(folder) == path.resolve()
    assert "LICENSE" not in {each.name for each in hub.sent}


def test_percent_of_the_progress_rise_to_100(hub: StandInHub, folder: Path) -> None:
    seen: list[int] = []
    _plan(hub, folder).run(seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 100


def test_a_plan_writes_nothing_to_the_cache(hub: StandInHub, folder: Path) -> None:
    plan = _plan(hub, folder)
    assert plan.missing_bytes == sum(file.size for file in plan.files)
    assert not (folder / "hub").exists()
    # The header of the weights, and no weights.
    assert hub.sent_bytes(WEIGHTS) <= 100_000


def test_a_second_pull_fetches_no_weights(hub: StandInHub, folder: Path) -> None:
    _pull(hub, folder)
    hub.sent.clear()
    plan = _plan(hub, folder)
    assert plan.missing_bytes == 0
    plan.run(lambda _percent: None)
    # Of the weights only the header is read again, and of the other files nothing.
    assert {each.name for each in hub.sent} == {WEIGHTS}
    assert hub.sent_bytes(WEIGHTS) <= 100_000


def test_a_lost_connection_continues_where_it_ended(hub: StandInHub, folder: Path) -> None:
    hub.cuts[WEIGHTS] = CUT
    plan = _plan(hub, folder)
    hub.sent.clear()
    plan.run(lambda _percent: None)
    assert hub.starts(WEIGHTS) == [0, CUT]
    assert hub.sent_bytes(WEIGHTS) == len(hub.trees[plan.commit][WEIGHTS])


def test_an_interrupted_pull_fetches_no_byte_twice(hub: StandInHub, folder: Path) -> None:
    def interrupt(_percent: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _plan(hub, folder).run(interrupt)
    kept = _partial(hub, folder).stat().st_size
    assert kept > 0
    plan = _plan(hub, folder)
    assert plan.missing_bytes == len(hub.trees[plan.commit][WEIGHTS]) - kept
    hub.sent.clear()
    plan.run(lambda _percent: None)
    assert hub.starts(WEIGHTS) == [kept]


def test_a_damaged_partial_file_is_fetched_anew(hub: StandInHub, folder: Path) -> None:
    plan = _plan(hub, folder)
    _partial(hub, folder).parent.mkdir(parents=True)
    _partial(hub, folder).write_bytes(b"x" * CUT)
    hub.sent.clear()
    path = plan.run(lambda _percent: None)
    assert hub.starts(WEIGHTS) == [CUT, 0]
    assert (path / WEIGHTS).read_bytes() == hub.trees[plan.commit][WEIGHTS]


def test_a_partial_file_that_is_too_long_is_fetched_anew(hub: StandInHub, folder: Path) -> None:
    plan = _plan(hub, folder)
    _partial(hub, folder).parent.mkdir(parents=True)
    _partial(hub, folder).write_bytes(b"x" * (len(hub.trees[plan.commit][WEIGHTS]) + 1))
    path = plan.run(lambda _percent: None)
    assert (path / WEIGHTS).read_bytes() == hub.trees[plan.commit][WEIGHTS]


def test_damaged_bytes_are_refused_and_removed(hub: StandInHub, folder: Path) -> None:
    hub.damaged += [WEIGHTS]
    plan = _plan(hub, folder)
    with pytest.raises(PullError, match=r"model.safetensors is damaged: .* checksum"):
        plan.run(lambda _percent: None)
    assert not _partial(hub, folder).exists()
    assert not (folder / "hub" / FOLDER / "refs").exists()
    _pull(hub, folder)


def test_a_file_damaged_on_the_disk_is_fetched_anew(hub: StandInHub, folder: Path) -> None:
    path = _pull(hub, folder)
    blob = (path / WEIGHTS).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    _pull(hub, folder)
    assert blob.read_bytes() == data


def test_a_server_without_ranges_is_read_from_the_start(hub: StandInHub, folder: Path) -> None:
    hub.ignores_ranges = True
    hub.cuts[WEIGHTS] = CUT
    path = _pull(hub, folder)
    assert (path / WEIGHTS).read_bytes() == hub.trees[path.name][WEIGHTS]


def test_a_branch_that_moves_meanwhile_gives_one_commit(hub: StandInHub, folder: Path) -> None:
    plan = _plan(hub, folder)
    files = hub.trees[plan.commit]
    newer = hub.commit({**files, "generation_config.json": b'{"temperature": 0.5}'})
    path = plan.run(lambda _percent: None)
    assert (path / "generation_config.json").read_bytes() == files["generation_config.json"]
    hub.sent.clear()
    # Only what changed is fetched, and then the branch is the newer commit.
    assert _pull(hub, folder).name == newer
    assert hub.sent_bytes(WEIGHTS) <= 100_000
    assert _located(folder).name == newer
    assert _located(folder, f"org/demo@{plan.commit}") == path.resolve()


def test_a_branch_stays_at_its_commit_until_the_newer_one_is_complete(
    hub: StandInHub, folder: Path
) -> None:
    first = _pull(hub, folder)
    files = hub.trees[first.name]
    hub.commit({**files, WEIGHTS: files[WEIGHTS][:-1] + b"\0"})
    hub.damaged += [WEIGHTS]
    with pytest.raises(PullError):
        _pull(hub, folder)
    assert _located(folder) == first.resolve()


def test_a_tag_is_pulled_under_its_name(hub: StandInHub, folder: Path) -> None:
    files = hub.trees[hub.revisions["main"]]
    commit = hub.commit({**files, "generation_config.json": b"{}"}, "v1")
    assert _pull(hub, folder, "v1").name == commit
    assert _located(folder, "org/demo@v1").name == commit


def test_an_unknown_revision_is_named(hub: StandInHub, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="org/demo has no revision 'v9'"):
        _plan(hub, folder, "v9")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no model org/demo .* or it is private"),
        (401, "", "refused access to org/demo .status 401.: set HF_TOKEN"),
        (403, "GatedRepo", "org/demo is gated: accept its terms at .*/org/demo, and set HF_TOKEN"),
        (403, "", "refused access to org/demo .status 403.: set HF_TOKEN"),
        (429, "", "takes no more requests for now: pull again in 7 seconds"),
        (503, "", "failed with status 503: pull again later"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(
    hub: StandInHub, folder: Path, status: int, code: str, message: str
) -> None:
    headers = {"X-Error-Code": code} if code else {}
    hub.statuses["/api/models/org/demo"] = (status, {**headers, "Retry-After": "7"})
    with pytest.raises((PullError, ModelNotFoundError), match=message) as caught:
        _plan(hub, folder)
    assert "\n" not in str(caught.value)


def test_a_gated_file_is_named_like_a_gated_repository(hub: StandInHub, folder: Path) -> None:
    hub.statuses[f"/{WEIGHTS}"] = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(PullError, match="org/demo is gated"):
        _plan(hub, folder)


def test_a_hub_that_fails_during_the_weights_is_tried_several_times(
    hub: StandInHub, folder: Path
) -> None:
    plan = _plan(hub, folder)
    hub.statuses[f"/{WEIGHTS}"] = (503, {})
    with pytest.raises(PullError, match="failed with status 503: pull again later"):
        plan.run(lambda _percent: None)


def test_an_unreachable_hub_is_one_sentence(hub: StandInHub, folder: Path) -> None:
    hub.url = "http://127.0.0.1:1"
    with pytest.raises(PullError, match=r"127\.0\.0\.1:1 cannot be reached, .* HF_ENDPOINT"):
        _plan(hub, folder)


def test_offline_mode_is_one_sentence(
    hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PullError, match="HF_HUB_OFFLINE is set"):
        _plan(hub, folder)


def test_the_token_of_the_environment_is_sent(
    hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _plan(hub, folder)
    assert "Bearer hf_secret" in hub.tokens


def test_a_disk_without_room_is_refused_with_numbers(
    hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(hub, folder)
    monkeypatch.setattr(type(plan), "free_bytes", 2**20)
    with pytest.raises(PullError, match=r"needs 3.8 MiB more .* has 1.0 MiB free: free 2.8 MiB"):
        plan.require_disk()


def test_a_disk_that_fills_up_keeps_what_was_fetched(hub: StandInHub, folder: Path) -> None:
    def fill(_percent: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(PullError, match=r"disk of .* is full: free up to 3.8 MiB"):
        _plan(hub, folder).run(fill)
    assert _partial(hub, folder).stat().st_size > 0
    _pull(hub, folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"", WEIGHTS: b""}, "has no config.json"),
        ({"config.json": b"{}", "model.gguf": b"GGUF"}, r"has no \*.safetensors .only model.gguf"),
        ({"config.json": b"{}", WEIGHTS: b"no header"}, "org/demo/model.safetensors: a header of"),
    ],
)
def test_a_repository_that_is_not_a_models_is_refused(
    hub: StandInHub, folder: Path, files: dict[str, bytes], message: str
) -> None:
    hub.commit(files)
    with pytest.raises(ModelUnsupportedError, match=message):
        _plan(hub, folder)
