"""Work items of prompts whose beginning is on disk, on a simulated machine."""

from __future__ import annotations

import random
from itertools import groupby

from runner_server.engine.types import CachePolicy, Prefill
from runner_server.engine.work import DecodeItem, PrefillItem, PromoteItem
from support.planned_machine import PART, Machine


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1, 1000), k=length)  # noqa: S311 - test data


def _promotions(machine: Machine) -> list[int]:
    return [item.row for item in machine.items if isinstance(item, PromoteItem)]


def test_a_prefix_on_disk_is_copied_part_by_part_then_restored_and_counted() -> None:
    prompt = _prompt(100, 0)
    machine = Machine(on_disk=[tuple(prompt[:64])])
    machine.add(0, prompt)
    machine.step()
    assert _promotions(machine) == [0] * (64 // PART)
    prefill = machine.items[64 // PART]
    assert isinstance(prefill, PrefillItem)
    assert prefill.chunks[0].restored == 64
    assert machine.progress[0] == Prefill(0, 99, 100, cached=64)


def test_a_prefix_that_cannot_be_read_any_more_is_prefilled_from_there() -> None:
    prompt = _prompt(100, 0)
    machine = Machine(on_disk=[tuple(prompt[:64])], lost_from=40)
    machine.add(0, prompt)
    machine.step()
    assert _promotions(machine) == [0, 0, 0]
    assert machine.progress[0] == Prefill(0, 99, 100, cached=32)


def test_the_disk_is_not_read_for_what_is_in_memory_or_bypassed() -> None:
    prompt = _prompt(100, 0)
    machine = Machine(on_disk=[tuple(prompt[:64])], stored=[tuple(prompt[:60])])
    machine.add(0, prompt)
    machine.add(1, _prompt(70, 1), CachePolicy(reads=False))
    machine.on_disk.append(tuple(_prompt(70, 2)))
    machine.add(2, _prompt(70, 2), CachePolicy(reads=False))
    while not all(machine.tokens.values()):
        machine.step()
    assert not _promotions(machine)
    assert machine.progress[0].cached == 60


def test_a_second_prompt_takes_the_first_ones_copy_from_memory() -> None:
    prompt = _prompt(200, 0)
    machine = Machine(on_disk=[tuple(prompt[:160])], keeps_prefixes=True)
    for row in range(2):
        machine.add(row, [*prompt[:160], *_prompt(30, row)])
    while not all(machine.tokens.values()):
        machine.step()
    assert len(_promotions(machine)) == 160 // PART
    assert [machine.progress[row].cached for row in range(2)] == [160, 160]


def test_prefixes_are_copied_one_after_another() -> None:
    """A copy ends its reads when another one begins."""
    machine = Machine()
    for row, rest in enumerate((40, 2, 20)):
        prompt = _prompt(300, row)
        machine.on_disk.append(tuple(prompt))
        machine.add(row, [*prompt, *_prompt(rest, row)])
    while not all(machine.tokens.values()):
        machine.step()
    copied = [row for row, _ in groupby(_promotions(machine))]
    assert sorted(copied) == [0, 1, 2]


def test_running_streams_decode_while_a_long_prefix_is_copied() -> None:
    machine = Machine()
    machine.add(0, _prompt(40, 0))
    machine.step()
    long = _prompt(4000, 1)
    machine.on_disk.append(tuple(long))
    machine.add(1, long)
    gaps, last = [], machine.clock
    while not machine.tokens[1]:
        machine.run_item()
        if isinstance(machine.items[-1], DecodeItem):
            gaps.append(machine.clock - last)
            last = machine.clock
    assert len(_promotions(machine)) == 3999 // PART + 1
    # A slice, and the item with which it ends.
    assert max(gaps) < 0.1 < sum(gaps)


def test_a_prompt_on_disk_that_ends_leaves_nothing_behind() -> None:
    prompt = _prompt(100, 0)
    machine = Machine(on_disk=[tuple(prompt[:64])])
    machine.add(0, prompt)
    machine.run_item()
    machine.remove(0)
    assert machine.planner.next_item() is None
