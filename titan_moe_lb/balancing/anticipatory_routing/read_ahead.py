"""Batches that are read some steps before a loop trains on them. Needs nothing but Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")


def read_ahead(
    batches: Iterator[Batch],
    prepare: Callable[[Batch], None],
    *,
    delay: int,
    steps: int,
    batches_per_step: int,
    end: type[Exception],
) -> Iterator[Batch]:
    """Yield the batches of each step, which were read and prepared ``delay`` steps before.

    Before the first batch of step s, step ``s + delay`` is read; before the first one of all, the
    steps up to ``1 + delay`` are. No batch is read that the last step does not need. Where the data
    end, the steps in flight are yielded first.

    Args:
        batches: batches of the data, which raise ``end`` where they end.
        prepare: function of each batch, called once its step was read.
        delay: distance in steps.
        steps: number of steps of the loop.
        batches_per_step: number of batches of a step.
        end: exception of the end of the data; raised again after the last whole step.
    """
    in_flight: deque[list[Batch]] = deque()
    read, ended = 0, None
    for step in range(steps):
        while ended is None and read <= min(step + delay, steps - 1):
            try:
                of_step = [next(batches) for _ in range(batches_per_step)]
            except end as error:
                ended = error
                break
            for batch in of_step:
                prepare(batch)
            in_flight.append(of_step)
            read += 1
        if ended is not None and not in_flight:
            raise ended
        yield from in_flight.popleft()
