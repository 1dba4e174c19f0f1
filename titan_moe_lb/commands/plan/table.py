"""A plan in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from titan_moe_lb.commands.plan import sentences
from titan_moe_lb.commands.plan.result import Plan
from titan_moe_lb.commands.plan.sentences import GIB, duration, number
from titan_moe_lb.commands.plan.verdict import placed
from titan_moe_lb.costmodel.times.predict import DegreePlan, Outcome

PIPE_WIDTH = 130


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the table of every degree, and what was measured."""
    console = console or terminal()

    say(console, sentences.verdict(plan))
    say(console, headline(plan))
    console.print(_analytic(plan))
    say(console, [fastest(plan), *map(fits_up_to, plan.degrees)])
    if plan.run:
        say(console, [run_line(plan)])
        console.print(_measured(plan))
        say(console, map(savings, plan.degrees))
        say(console, [STALE])
        console.print(_table(STALE_COLUMNS, plan, stale_cells))
    if plan.degrees[0].capacity:
        say(console, [sentences.CAPACITY])
        console.print(_table(CAPACITY_COLUMNS, plan, capacity_cells))


def terminal() -> Console:
    """The terminal; a file or a pipe has room for the whole table."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def say(console: Console, lines: Iterable[str]) -> None:
    """Sentences, of which a pipe gets each in one line."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def headline(plan: Plan) -> list[str]:
    """What was asked of what, in sentences."""
    job, device = plan.job, plan.device
    layer = next(iter(job.moe_layers.values()))
    state = max(job.states.values(), key=lambda state: state.num_parameters)
    return [
        f"{job.model_name} {job.flavor} on {job.num_ranks} x {device.name}: "
        f"{len(job.moe_layers)} MoE layers, {layer.num_experts} experts, top {layer.top_k}, "
        f"{job.tokens_per_microbatch} tokens a micro-batch, checkpointing {job.checkpointing}",
        f"largest rank at EP {job.ep_degree}: rank {state.rank}, {state.num_parameters:,} "
        f"parameters, {state.parameter_bytes / GIB:.2f} GiB; "
        f"{sentences.usable_memory(plan.usable_bytes, device)}; {plan.flags.hot_experts} hot "
        f"expert(s); {sentences.efficiencies(plan.flags)}",
    ]


def _analytic(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("EP", "imbalance", *COLUMNS):
        table.add_column(name, justify="right", overflow="fold")
    for degree in plan.degrees:
        for row in degree.rows:
            table.add_row(
                str(degree.ep_degree), f"{row.imbalance_factor:.2f}", *_styled(row.outcome)
            )
        for drawn in degree.lognormal:
            table.add_row(str(degree.ep_degree), drawn.name, *_styled(drawn.outcome))
        table.add_section()
    return table


COLUMNS = (
    "compute ms",
    "dispatch ms",
    "combine ms",
    "layer x",
    "step s",
    "step x",
    "hot expert",
    "busiest rank",
    "memory GiB",
)


def cells(outcome: Outcome) -> list[str]:
    """What the columns show."""
    memory = number(outcome.memory_bytes / GIB)
    return [
        number(outcome.compute_seconds * 1e3),
        number(outcome.dispatch_seconds * 1e3),
        number(outcome.combine_seconds * 1e3),
        f"{outcome.layer_slowdown:.2f}",
        number(outcome.step_seconds),
        f"{outcome.step_slowdown:.2f}",
        f"{outcome.hot_expert_tokens:,.0f}",
        f"{outcome.busiest_rank_tokens:,.0f}",
        memory if outcome.fits else f"{memory} no",
    ]


def _styled(outcome: Outcome) -> list[str]:
    *others, memory = cells(outcome)
    return [*others, memory if outcome.fits else f"[red]{memory}[/red]"]


def fastest(plan: Plan) -> str:
    """Which degree has the shortest step at the least and at the most imbalance asked for.

    The slowdowns cannot say it: each is against balance at its own degree.
    """
    found = []
    rows = list(zip(*(degree.rows for degree in plan.degrees), strict=True))
    for row in sorted({0, len(rows) - 1}, key=lambda row: rows[row][0].imbalance_factor):
        imbalance = f"imbalance {rows[row][0].imbalance_factor:.2f}"
        fitting = [
            (one.outcome.step_seconds, degree.ep_degree)
            for degree, one in zip(plan.degrees, rows[row], strict=True)
            if one.outcome.fits
        ]
        if fitting:
            seconds, ep_degree = min(fitting)
            found.append(f"EP {ep_degree} at {imbalance} ({duration(seconds)} a step)")
        else:
            found.append(f"none fits at {imbalance}")
    return f"Fastest of those that fit: {', '.join(found)}. Each x is against balance at its own EP"


def fits_up_to(degree: DegreePlan) -> str:
    """What still fits, in a sentence."""
    largest = degree.largest_imbalance_that_fits
    if largest is None:
        return f"EP {degree.ep_degree}: does not fit even at balance"
    return f"EP {degree.ep_degree}: fits up to imbalance {largest:.2f}"


def run_line(plan: Plan) -> str:
    """What the measured rows are of."""
    assert plan.run is not None
    run = plan.run
    losses = ", ".join(f"{name} {weight:g}" for name, weight in run["losses"].items()) or "none"
    return (
        f"Measured in {run['path']} ({run['layout']}; aux losses: {losses}; expert bias: "
        f"{run['expert_bias'] or 'off'}): steps {_span(run['first_steps'])} and "
        f"{_span(run['last_steps'])}. In single micro-batches its busiest rank had up to "
        f"{run['max_overload_factor']:.2f} x the balanced tokens (EP {run['ep_degree']}); at last its "
        f"loads are about log-normal with sigma {run['sigma']:.2f}"
    )


def savings(degree: DegreePlan) -> str:
    """What balancing has savings during the run, and what moving experts could buy."""
    contiguous, greedy, *_with_copies = degree.measured
    first, last, moved = (
        f"{one.step_slowdown:.2f} x balance ({duration(one.step_seconds)})"
        for one in (contiguous.first, contiguous.last, greedy.last)
    )
    return (
        f"EP {degree.ep_degree}: a step took {first} at first and takes {last} at last; "
        f"with experts placed greedily {moved}"
    )


def _span(steps: list[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _measured(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE)
    for name in ("EP", "experts placed", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    for degree in plan.degrees:
        for row in degree.measured:
            for when, outcome in (("first", row.first), ("last", row.last)):
                table.add_row(str(degree.ep_degree), placed(row), when, *_styled(outcome))
        table.add_section()
    return table


def _table(
    columns: tuple[str, ...], plan: Plan, cells_of: Callable[[DegreePlan], list[list[str]]]
) -> Table:
    """Rows of every degree, ruled off."""
    table = Table(box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for degree in plan.degrees:
        for row in cells_of(degree):
            table.add_row(*row)
        table.add_section()
    return table


STALE = (
    "Steps against balance, with experts placed for a load that is known and judged on a later one"
)
STALE_COLUMNS = (
    "EP",
    "experts placed",
    "last steps, placed for them",
    "second half, placed for the first",
    "last steps, placed for the first half",
)


def stale_cells(degree: DegreePlan) -> list[list[str]]:
    """How much of what placing buys is left when the load has moved on: step x of each."""
    return [
        [
            str(degree.ep_degree),
            placed(row),
            *(
                f"{outcome.step_slowdown:.3f}"
                for outcome in (row.last, row.stale_second_half, row.stale_last)
            ),
        ]
        for row in degree.measured
    ]


CAPACITY_COLUMNS = ("EP", "drops", "capacity factor", "HybridEP's", "memory GiB")


def capacity_cells(degree: DegreePlan) -> list[list[str]]:
    return [
        [
            str(degree.ep_degree),
            f"{row.drop_share:.3g}" if row.drop_share else "none",
            f"{row.capacity_factor:.3f}",
            f"{row.non_blocking_capacity_factor:.4f}",
            number(row.memory_bytes / GIB) + ("" if row.fits else " no"),
        ]
        for row in degree.capacity
    ]
