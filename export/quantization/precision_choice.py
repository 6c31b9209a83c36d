"""Find the projections that cost the most quality when they are quantized, and leave as few as needed unquantized."""

from collections.abc import Callable, Sequence

from torch import Tensor

from starling.export.check.sample_texts import TokenRows
from starling.export.quantization.qdq_plan import names_of
from starling.export.quantization.simulation import Simulation, mean_kl
from starling.export.quantization.smoothquant import InputGroup

_ROWS, _ROW_TOKENS = 8, 48  # text that the choice is made on: enough to rank projections, quick enough to try each
OnTrial = Callable[[int, int], None]


def judged_rows(rows: TokenRows) -> TokenRows:
    """The beginnings of some of the calibration's rows, spread over all of it."""
    step = max(1, len(rows.lengths) // _ROWS)
    lengths = tuple(min(length, _ROW_TOKENS) for length in rows.lengths[::step][:_ROWS])
    return TokenRows(rows.ids[::step][:_ROWS, : max(lengths)], lengths)


def choose_kept(
    simulation: Simulation,
    groups: Sequence[InputGroup],
    rows: TokenRows,
    target: float,
    on_trial: OnTrial | None = None,
) -> list[InputGroup]:
    """The fewest groups, costliest first, without which the mean KL on `rows` is at most `target` nats."""
    reference = _run(simulation, [], rows)

    def kl(quantized: Sequence[InputGroup]) -> float:
        return mean_kl(reference, _run(simulation, quantized, rows))

    if kl(groups) <= target:
        return []
    ranked = rank_groups(simulation, groups, rows, on_trial)
    low, high = 0, len(groups)  # keeping `low` is too few, keeping `high` is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kl(ranked[middle:]) <= target else (middle, high)
    return ranked[:high]


def rank_groups(
    simulation: Simulation, groups: Sequence[InputGroup], rows: TokenRows, on_trial: OnTrial | None = None
) -> list[InputGroup]:
    """The groups, costliest first: a cost is the KL of the model in which that group alone is quantized.

    `on_trial(done, total)` is called after each trial.
    """
    reference = _run(simulation, [], rows)
    costs = []
    for done, group in enumerate(groups):
        costs.append(mean_kl(reference, _run(simulation, [group], rows)))
        if on_trial is not None:
            on_trial(done + 1, len(groups))
    return [groups[i] for i in sorted(range(len(groups)), key=lambda i: -costs[i])]


def _run(simulation: Simulation, quantized: Sequence[InputGroup], rows: TokenRows) -> Tensor:
    simulation.activate(names_of(quantized))
    return simulation.log_probabilities(rows)
