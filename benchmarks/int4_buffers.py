"""Compares losses with accumulators of every width and with ECO, for large, small and many steps.

The quickstart's pools train at the best learning rate, and at a tenth of it. The pools of a smaller
model train at a tenth of it for twenty times as many steps. Each is compared with 4-bit
accumulators at the same rate, seed by seed.
"""

import itertools

from benchmarks.int4_arms import COLUMNS, ECO, INT4, against, at_best_rates, tuned
from benchmarks.protocol import OF_POOLS, QUICK_STEPS, RECIPE, SEEDS, STEPS
from benchmarks.result import Result
from benchmarks.sweep import Settings, from_seeds, made_by, paired, rung

LONG_STEPS = 10_000
BUFFERS = (0, 2, 4, 8)
SMALL_MODEL = "a small model"  # small enough to train for long
BEST, TENTH = "best rate", "a tenth of it"
LONG: Settings = {
    "model.width": 64, "mlp.hidden": 256, "peer.num_experts": (64, 64), "peer.key_width": 32,
    "data.sequence_length": 128, "data.batch_size": 2, "checkpoint.every": 500,
}  # fmt: skip
WHERE = ((RECIPE, BEST), (RECIPE, TENTH), (SMALL_MODEL, TENTH))


def run(quick: bool) -> Result:
    """Trains all arms that no earlier call trained, and compares them."""
    steps, seeds = (QUICK_STEPS, SEEDS[:2]) if quick else (STEPS, SEEDS)
    arms = at_best_rates(tuned(steps), steps)
    rows, figures, details = [], [], {}
    for where in WHERE:
        there = buffers(arms, *where, QUICK_STEPS if quick else LONG_STEPS)
        runs = from_seeds(RECIPE, there, seeds)
        found = {name: [run.nats_per_token for run in each] for name, each in runs.items()}
        of_four = found[_bits(4)]
        rows += [
            against(", ".join((*where, name)), settings, found[name], of_four)
            for name, settings in there.items()
        ]
        for wide in (4, 8):
            difference = paired(found[_bits(0)], found[_bits(wide)])
            figures += difference.figures(f"{', '.join(where)}: 0 bits - {wide} bits (nats/token)")
        made = made_by(itertools.chain(*runs.values()))
        details[", ".join(where)] = {"losses": found, "runs_of": made}
    return Result(COLUMNS, rows, figures, details)


def buffers(
    arms: dict[str, Settings], model: str, rate: str, long_steps: int
) -> dict[str, Settings]:
    """Returns settings with accumulators of every width and with ECO, for a case of `WHERE`."""
    there: dict[str, Settings] = {}
    for name in (INT4, ECO):
        settings = dict(arms[name])
        if rate == TENTH:  # these steps are the most likely to need a buffer
            settings[OF_POOLS] = rung(settings[OF_POOLS], -2)
        if model == SMALL_MODEL:
            settings |= {**LONG, "steps": long_steps, "eval.every": long_steps}
        there[name] = settings
    # The recipe has 4 bits.
    widths = {bits: {} if bits == 4 else {"pool.accumulator_bits": bits} for bits in BUFFERS}
    return {_bits(bits): there[INT4] | more for bits, more in widths.items()} | {ECO: there[ECO]}


def _bits(count: int) -> str:
    return f"{count} bits"
