"""Plan the budget of many images from measured latency."""

from __future__ import annotations

from collections.abc import Sequence

from crowdexit.calibration.intervals import Intervals
from crowdexit.inference.budget import Budget, BudgetTooSmall, Costs
from crowdexit.inference.latency import Latency
from crowdexit.inference.profile import LAYING, PREPARING, exit_step, stage_step
from crowdexit.models.network import MultiExitNetwork


def plan_budget(
    budget_ms: float,
    number: int,
    exits: Sequence[str],
    *,
    network: MultiExitNetwork,
    intervals: Intervals,
    latency: Latency,
) -> Budget:
    """The policy that counts a number of images within a time.

    Args:
        exits: names of the exits to use.

    Raises:
        BudgetError: if the first exit is not calibrated. BudgetTooSmall: if the first exits alone take longer, even
            after latency was measured again.
    """
    collator = latency.collator
    rows = min(collator.rows_in_batch, max(1, number))
    times = latency.profile
    errors = {has_audio: intervals.errors(has_audio=has_audio) for has_audio in (False, True)}

    def row_ms(step: str) -> float:
        ms = times.ms(step, rows)
        assert ms is not None
        return ms / rows

    def planned() -> Budget:
        costs = Costs(
            [row_ms(stage_step(index)) for index in range(len(network.stages))],
            {name: row_ms(exit_step(name)) for name in exits},
            {name: network.stage_of(name) for name in exits},
        )
        preparing_ms = (times.ms(PREPARING) or 0.0) + collator.views * row_ms(LAYING)
        return Budget(budget_ms, number, exits, errors, costs, preparing_ms, collator.views)

    try:
        return planned()
    except BudgetTooSmall:
        if latency.measured:
            raise
        # The machine may have been busy when it was measured.
        latency.measure_again()
        return planned()
