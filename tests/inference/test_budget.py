"""Budgets: the plan against brute force, and whole runs on a simulated machine whose clock only its steps move."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crowdexit.inference.budget import Budget, BudgetError, Costs, greedy_allocation, pareto_options
from crowdexit.inference.executor import Batch, Part, StageExecutor
from crowdexit.models.stages import ExitOutput

EXITS = ["a", "b", "c", "final"]
STAGE_OF = dict(zip(EXITS, range(4), strict=True))
COSTS = Costs([60.0, 5.0, 12.0, 25.0], dict.fromkeys(EXITS, 1.0), STAGE_OF)
ERRORS = {"a": 0.4, "b": 0.3, "c": 0.35, "final": 0.2}


class Simulated:
    """A chain that takes the time it is told to, and counts what the batch says; ``state`` is the rows' counts."""

    exit_names = EXITS

    def __init__(self, costs: Costs, slowdown=lambda: 1.0) -> None:
        self.costs, self.slowdown, self.now = costs, slowdown, 0.0

    def stage_of(self, name: str) -> int:
        return self.costs.stage_of[name]

    def begin(self, features):
        return features

    def advance(self, index, state):
        self.now += self.slowdown() * len(state) * self.costs.stages[index] / 1000
        return state

    def run_exit(self, name, state):
        self.now += self.slowdown() * len(state) * self.costs.exits[name] / 1000
        return ExitOutput(state)

    def select(self, state, keep):
        return state[keep]


def run(counts, budget_ms, **how):
    """(exit by image, milliseconds taken) of images with these counts."""
    left, took, _ = finish(counts, budget_ms, **how)
    return left, took


def finish(
    counts,
    budget_ms,
    *,
    errors=ERRORS,
    costs=COSTS,
    slowdown=lambda: 1.0,
    preparing=0.0,
    really=None,
    batch_size=4,
    in_flight=32,
    pause=0.0,
):
    """As :func:`run`, and the budget at its end.

    ``really`` is what preparing takes, where that is not what the profile says; ``pause`` what the caller does between
    two windows.
    """
    machine = Simulated(costs, slowdown)
    both = {False: errors, True: errors}
    budget = Budget(budget_ms, len(counts), EXITS, both, costs, preparing, clock=lambda: machine.now)
    left = []
    for start in range(0, len(counts), in_flight):
        window = counts[start : start + in_flight]
        begun = []
        budget.window(begun)
        executor = StageExecutor(machine, len(window), EXITS, clock=lambda: machine.now)

        def parts(window=window, begun=begun):
            for at in range(0, len(window), batch_size):
                rows = torch.tensor(window[at : at + batch_size], dtype=torch.float32)
                machine.now += slowdown() * (preparing if really is None else really) * len(rows) / 1000
                begun += [SimpleNamespace(has_audio=False)] * len(rows)
                batch = Batch(lambda rows=rows: rows, len(rows))
                yield Part(np.arange(at, at + len(rows)), np.ones(len(rows), int), [batch])

        results = [""] * len(window)
        for report in executor.run(parts(), budget):
            for number in [] if report is None else report.samples:
                results[number] = report.exit
        budget.finish()
        machine.now += pause / 1000
        left += results
    return left, 1000 * machine.now, budget


def crowds(number: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).lognormal(4, 1, number).tolist()


def test_the_ladder_is_the_convex_hull():
    assert pareto_options(EXITS, ERRORS, COSTS) == ["a", "b", "final"]  # c is worse than b
    assert pareto_options(EXITS, {**ERRORS, "b": 0.39, "c": 0.3}, COSTS) == [
        "a",
        "c",
        "final",
    ]  # b is dear for what it gives
    assert pareto_options(EXITS, {"a": 0.1, "b": 0.2, "c": 0.3, "final": 0.4}, COSTS) == ["a"]
    assert pareto_options(EXITS, {"a": 0.4, "final": 0.3}, COSTS) == ["a", "final"]
    free = Costs([1.0], dict.fromkeys(EXITS, 0.0), dict.fromkeys(EXITS, 0))
    assert pareto_options(EXITS, {**ERRORS, "b": 0.31}, free) == ["a", "final"]


steps = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3).map(
    lambda made: sorted(made, key=lambda step: -step[1] / step[0])
)


@given(st.lists(steps, min_size=1, max_size=5), st.integers(0, 60))
def test_no_other_choice_is_better_for_its_time(options, room):
    """Against every other choice; and what the last step leaves over is never worth more than that step."""
    taken = greedy_allocation(options, room)

    def worth(choice):
        return tuple(sum(step[i] for of, n in zip(options, choice, strict=True) for step in of[:n]) for i in (0, 1))

    every = [worth(choice) for choice in itertools.product(*(range(len(of) + 1) for of in options))]
    cost, gain = worth(taken)
    assert cost <= room
    best = max(g for c, g in every if c <= room)
    biggest = max((g for of in options for _, g in of), default=0)
    assert best - gain <= biggest
    if best != gain:  # then something did not fit
        assert any(n < len(of) and cost + of[n][0] > room for of, n in zip(options, taken, strict=True))


@given(st.lists(steps, min_size=1, max_size=5), st.integers(0, 20))
def test_steps_in_the_order_of_their_price_are_optimal(options, number):
    """With exactly the room for the first so many steps, nothing beats them."""
    order = sorted((-gain / cost, of, n) for of, made in enumerate(options) for n, (cost, gain) in enumerate(made))
    chosen = [options[of][n] for _, of, n in order[:number]]
    room, expected = sum(cost for cost, _ in chosen), sum(gain for _, gain in chosen)
    taken = greedy_allocation(options, room)
    assert sum(gain for of, n in zip(options, taken, strict=True) for _, gain in of[:n]) >= expected
    every = itertools.product(*(range(len(of) + 1) for of in options))
    best = 0
    for choice in every:
        made = [step for of, n in zip(options, choice, strict=True) for step in of[:n]]
        if sum(cost for cost, _ in made) <= room:
            best = max(best, sum(gain for _, gain in made))
    assert best == expected


def test_those_to_come_compete():
    ours, theirs = [[(1.0, 1.0)]] * 2, [[(1.0, 2.0)]]
    assert greedy_allocation(ours, 2.0) == [1, 1]
    assert greedy_allocation(ours, 4.0, theirs, 3.0) == [1, 0]
    assert greedy_allocation(ours, 2.5, theirs, 3.0) == [0, 0]  # not all of them fit: as many as do


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("number", [40, 100, 333])
def test_a_run_keeps_to_its_budget(number, share):
    least, most = number * 61.0, number * (61.0 + 5 + 1 + 12 + 25 + 1)
    budget = least + share * (most - least)
    exits, took = run(crowds(number), budget)
    assert took == pytest.approx(budget, rel=0.05)
    assert took <= 1.05 * budget
    assert set(exits) <= {"a", "b", "final"}


@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1, 1.3])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_machine_faster_or_slower_than_its_profile(factor, share):
    number = 64
    least, most = number * 61.0 * factor, number * 105.0 * factor
    budget = least + share * (most - least)
    if (share, factor) == (0.3, 0.7):  # enough for this machine, but who is to know?
        with pytest.raises(BudgetError, match="too small for 64 images"):
            run(crowds(number), budget, slowdown=lambda: factor)
        return
    _, took = run(crowds(number), budget, slowdown=lambda: factor)
    assert took == pytest.approx(budget, rel=0.05)


def test_a_machine_that_stumbles():
    """Every step takes between half and one and a half times as long, and preparing counts too."""
    random = np.random.default_rng(1)
    for seed in range(5):
        number = 80
        _, took = run(crowds(number, seed), number * 95.0, slowdown=lambda: random.uniform(0.5, 1.5), preparing=12.0)
        assert took == pytest.approx(number * 95.0, rel=0.05)


def test_the_dense_go_deep():
    counts = crowds(32)
    exits, _ = run(counts, 32 * 80.0, batch_size=1)
    deep = [count for count, exit in zip(counts, exits, strict=True) if exit == "final"]
    shallow = [count for count, exit in zip(counts, exits, strict=True) if exit == "b"]
    assert len(deep) > 3
    assert len(shallow) > 3
    assert min(deep) > max(shallow)


def test_little_is_lost_by_not_knowing_what_comes():
    """Planned window by window, the expected error is hardly more than with everything known at once."""
    counts = crowds(160)

    def error(exits):
        return sum(ERRORS[exit] * (count + 10) for exit, count in zip(exits, counts, strict=True))

    piecemeal, _ = run(counts, 160 * 85.0, in_flight=16)
    whole, _ = run(counts, 160 * 85.0, in_flight=160)
    assert error(whole) <= error(piecemeal) * 1.001
    assert error(piecemeal) < 1.03 * error(whole)
    assert error(whole) < 0.85 * error(["a"] * 160)


def test_what_is_more_than_enough_is_not_burnt():
    exits, took = run(crowds(20), 1e6)
    assert set(exits) == {"final"}
    assert took == pytest.approx(20 * 105.0)


def test_an_exit_that_is_no_better_is_not_gone_to():
    exits, took = run(crowds(20), 1e6, errors={"a": 0.2, "b": 0.3, "c": 0.2, "final": 0.4})
    assert set(exits) == {"a"}
    assert took == pytest.approx(20 * 61.0)


def test_budgets_that_cannot_be():
    for wrong in (0, -3, float("nan")):
        with pytest.raises(BudgetError, match="is not positive"):
            run(crowds(4), wrong)
    with pytest.raises(BudgetError, match=r"200 ms is too small for 4 images: their first exits alone take about 244"):
        run(crowds(4), 200)
    with pytest.raises(BudgetError, match="exit a is not calibrated"):
        run(crowds(4), 1000, errors={})


def test_uncountable_images_leave_their_time_to_the_others():
    machine = Simulated(COSTS)
    budget = Budget(8 * 61.0, 8, EXITS, {False: ERRORS, True: ERRORS}, COSTS, 0.0, clock=lambda: machine.now)
    budget.window([SimpleNamespace(has_audio=False)] * 4)
    for _ in range(4):
        budget.skip()
    executor = StageExecutor(machine, 4, EXITS, clock=lambda: machine.now)
    rows = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    for _ in executor.run([Part(np.arange(4), np.ones(4, int), [Batch(lambda: rows, 4)])], budget):
        pass
    assert 1000 * machine.now == pytest.approx(4 * 105.0)


def test_a_network_whose_first_exit_stands_late():
    late = Costs([20.0, 20.0, 20.0, 30.0], dict.fromkeys(EXITS, 1.0), {"a": 2, "b": 2, "c": 3, "final": 3})
    exits, took = run(crowds(60), 60 * 80.0, costs=late)
    assert took == pytest.approx(60 * 80.0, rel=0.05)
    assert set(exits) == {"b", "final"}


CROWDED = Costs([60.0, 5.0, 12.0, 25.0], {"a": 1.0, "b": 2.0, "c": 3.0, "final": 1.0}, {**STAGE_OF, "b": 0, "c": 0})
FALLING = {"a": 0.8, "b": 0.4, "c": 0.3, "final": 0.1}


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_exits_after_the_first_stage_are_in_the_first_pass(factor):
    """Preparing and first stages between them are nobody's climbing: the machine is as fast as it is."""
    make_batch = 10.0 + 60 + 1 + 2 + 3
    budget_ms = 200 * (make_batch + 20.0) * factor
    exits, took, budget = finish(
        crowds(200), budget_ms, costs=CROWDED, errors=FALLING, preparing=10.0, slowdown=lambda: factor
    )
    assert took == pytest.approx(budget_ms, rel=0.05)
    assert set(exits) == {"c", "final"}
    assert budget.first_pass_ms == pytest.approx(make_batch * factor, rel=0.02)
    assert budget.slowdown == pytest.approx(factor, rel=0.1)


def test_the_plan_chooses_between_exits_of_one_stage():
    """Deeper than the first stage not everybody who comes to an exit goes on to the next one there."""
    costs = Costs([60.0, 5.0, 12.0, 25.0], {"a": 1.0, "b": 1.0, "c": 30.0, "final": 1.0}, {**STAGE_OF, "c": 1})
    exits, took, budget = finish(crowds(100), 100 * 75.0, costs=costs, errors={"a": 0.8, "b": 0.5, "c": 0.3})
    assert took == pytest.approx(100 * 75.0, rel=0.05)
    assert {"b", "c"} <= set(exits)
    assert budget.slowdown == pytest.approx(1.0, rel=0.01)


def test_what_the_caller_does_meanwhile_is_not_the_machines_pace():
    _, took, budget = finish(crowds(128), 128 * 110.0, pause=800.0)
    assert took <= 1.05 * 128 * 110.0 + 800.0  # the last pause comes after the end
    assert (budget.first_pass_ms, budget.slowdown) == (pytest.approx(61.0), pytest.approx(1.0))


def test_first_exits_that_take_longer_than_was_thought():
    """Told long before the time is up; what the profile says would have been enough."""
    machine = []
    with pytest.raises(BudgetError, match=r"too small for 200 images: their first exits .* about 2\d\d\d\d ms"):
        finish(crowds(200), 200 * 90.0, preparing=10.0, really=100.0, slowdown=lambda: machine.append(0) or 1.0)
    assert len(machine) < 100  # of some 250 steps for the first exits alone
    # One step that hangs is not taken for what is to come.
    hangs = iter([40.0])
    _, took = run(crowds(200), 200 * 75.0, slowdown=lambda: next(hangs, 1.0))
    assert took == pytest.approx(200 * 75.0, rel=0.05)


def test_a_first_exit_that_stands_late_is_enough():
    """All images of a window go through the stages before it before any comes to it."""
    late = Costs([20.0, 20.0, 20.0, 30.0], dict.fromkeys(EXITS, 1.0), {"a": 2, "b": 2, "c": 3, "final": 3})
    exits, _ = run(crowds(60), 60 * 62.0, costs=late)
    assert "b" in exits
