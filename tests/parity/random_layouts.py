"""Draw layouts at random and compare each with one process."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.parity.balance import LOSSES, RULES, Balance
from tests.parity.compare import Parity
from tests.parity.gradients import GLOBAL_BATCH_SIZE, make_config
from tests.parity.layout import CHECKPOINTING, Layout
from tests.support.rank_pool import RankPool
from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.schedules import SCHEDULES
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import validate

LAYOUTS_OF_A_BALANCE = 10
"""Layouts with the same balance, because a new balance needs a new reference."""
DEGREES = ("pp", "dp_shard", "dp_replicate", "tp", "cp")
MODULE, CONFIG = "deepseek_v3", "deepseek_v3_tiny"


@dataclass
class Outcome:
    """Counts and failures of a run."""

    layouts: int = 0
    refused: int = 0
    """Draws that our rules or torch refuse before the first pass."""
    worst: float = 0.0
    worst_command: str = ""
    failures: list[str] = field(default_factory=list)


def draw_balance(dice: random.Random) -> Balance:
    """Draw some losses, a rule, perhaps padding, and the score function."""
    losses = tuple(kind for kind in LOSSES if dice.random() < 0.4)
    bias = dice.choice([rule for rule in RULES if losses or rule != "none"])
    # A bias made of the quantiles of a batch leaves tokens of the same batch on the fence; with
    # padding each pass has a batch of its own.
    padded = bias.startswith("quantile") or dice.random() < 0.4
    return Balance(losses, bias, padded, dice.choice(["", "sqrtsoftplus"]))


def draw_layout(dice: random.Random, most_ranks: int) -> Layout:
    """Draw a layout, which may be invalid; all degrees and options are about as likely."""
    degrees = dict.fromkeys(DEGREES, 1)
    while (rest := most_ranks // Layout(**degrees).num_ranks) > 1 and dice.random() < 0.8:
        degrees[dice.choice(DEGREES)] *= dice.choice([n for n in (2, 4) if n <= rest])
    compiled = dice.random() < 0.25
    layout = Layout(
        **degrees,
        ep=dice.choice([1, 2, 4]),
        microbatch=dice.choice([1, 2, 4]) if degrees["pp"] > 1 else 1,
        accumulate=dice.choice([1, 2, 4, 8]),
        ac=dice.choice(list(CHECKPOINTING)),
        compile=compiled,
        spmd_backend=dice.choice(
            ["spmd_types"] * 4 + ["partial_dtensor", "full_dtensor"],
        ),
    )
    if degrees["pp"] > 1:
        layout = dataclasses.replace(layout, schedule=dice.choice(list(SCHEDULES)))
    if degrees["tp"] > 1:
        layout = dataclasses.replace(layout, sequence_parallel=dice.random() < 0.7)
    if compiled and dice.random() < 0.85:
        layout = dataclasses.replace(layout, backend="aot_eager")
    return layout


def is_valid(layout: Layout, balance: Balance) -> bool:
    """Return True if our rules and torchtitan accept the layout."""
    rows, rest = divmod(GLOBAL_BATCH_SIZE, layout.dp * layout.accumulate)
    if rest or (layout.pp > 1 and rows % layout.microbatch):
        return False
    try:
        job = Job.of(make_config(layout, MODULE, CONFIG, balance.model()), layout.num_ranks)
        validate(job)
        job.bound  # noqa: B018  torchtitan's own checks
    except (JobError, ValueError, NotImplementedError, AssertionError):
        return False
    return True


def draws(
    dice: random.Random, most_ranks: int, outcome: Outcome
) -> Iterator[tuple[Balance, Layout]]:
    """Draw valid layouts without end; no layout occurs twice with one balance."""
    while True:
        balance, seen = draw_balance(dice), set()
        while len(seen) < LAYOUTS_OF_A_BALANCE:
            layout = draw_layout(dice, most_ranks)
            if layout in seen:
                continue
            if not is_valid(layout, balance):
                outcome.refused += 1
                continue
            seen.add(layout)
            yield balance, layout


def run(pool: RankPool, number: int, seed: int, say=print) -> Outcome:
    """Compare ``number`` layouts; report a line for each, and the command of each that fails."""
    outcome = Outcome()
    drawn = itertools.islice(draws(random.Random(seed), pool.size, outcome), number)
    for balance, group in itertools.groupby(drawn, key=lambda pair: pair[0]):
        with Parity(pool, balance.model(), with_main_loss=True, padded=balance.padded) as parity:
            for _balance, layout in group:
                _compare(parity, balance, layout, outcome, say)
    return outcome


def _compare(parity: Parity, balance: Balance, layout: Layout, outcome: Outcome, say) -> None:
    command = f'python -m tests.parity --layout "{layout}" {balance.flags()} --with-main-loss'
    begun = time.monotonic()
    outcome.layouts += 1
    try:
        (comparison,) = parity.compare(layout)
    except (RuntimeError, AssertionError) as error:
        outcome.failures.append(command)
        say(f"{outcome.layouts:4}  FAILED  {command}\n{error}", flush=True)
        return
    found = comparison.faults()
    if comparison.max_relative_error > outcome.worst:
        outcome.worst, outcome.worst_command = comparison.max_relative_error, command
    if found:
        outcome.failures.append(command)
    verdict = f"DIFFERS in {', '.join(found)}" if found else "equal"
    say(
        f"{outcome.layouts:4}  {comparison.max_relative_error:.1e}  {time.monotonic() - begun:5.1f} s  "
        f"{verdict}  {command}",
        flush=True,
    )
