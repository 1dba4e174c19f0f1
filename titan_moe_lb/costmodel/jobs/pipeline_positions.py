"""Pipeline ranks of a job, and which of them are alike.

A plan builds one of several ranks that are alike, and only the layers of that rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from titan_moe_lb.costmodel.times.job import Stage
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.upstream.pipeline_stages import cuts_by_name, modules_of_stages, stages_of_rank

_WITHOUT_SIZE = ("param_init", "layer")
"""Fields of a config that differ from layer to layer and change no size: the initializers, and
the layer number of a router."""


@dataclass(frozen=True)
class Position:
    """Pipeline rank of a job, before it is built.

    Attributes:
        stages: decoder layers of each of its stages; None if torchtitan alone knows them.
        kind: two ranks of equal kind have equal sizes.
    """

    stages: dict[int, list[int]] | None
    kind: Any

    @property
    def layers(self) -> set[int] | None:
        """Decoder layers of the rank; None: any of the model."""
        if self.stages is None:
            return None
        return {layer for layers in self.stages.values() for layer in layers}

    def stages_like(self, other: Position, built: dict[int, Stage]) -> dict[int, Stage]:
        """Derive the stages of this rank from those that were built for a rank of the same kind."""
        assert self.stages is not None and other.stages is not None
        return {
            stage: _renumbered(built[twin], dict(zip(old, new, strict=True)))
            for (stage, new), (twin, old) in zip(
                self.stages.items(), other.stages.items(), strict=True
            )
        }


def positions_of(job: Job) -> list[Position]:
    """List the pipeline ranks of a job, whose config is bound."""
    config, layout = job.config, job.layout
    spec, parallelism = config.model_spec, config.parallelism
    if layout.pp == 1 or not cuts_by_name(spec.pipelining_fn):
        return [Position(None, position) for position in range(layout.pp)]
    names = modules_of_stages(layout, parallelism, spec.model)
    kinds = [_without_numbers(layer) for layer in spec.model.layers]
    return [
        Position(
            {stage: _layers(names[stage]) for stage in stages},
            [
                [*_others(names[stage]), *(kinds[n] for n in _layers(names[stage]))]
                for stage in stages
            ],
        )
        for stages in (
            stages_of_rank(position, layout, parallelism, len(names))
            for position in range(layout.pp)
        )
    ]


def _layers(names: list[str]) -> list[int]:
    return [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]


def _others(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("layers.")]


def _without_numbers(config: Any) -> Any:
    """Convert a config to nested lists that are equal for layers of equal sizes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return [
            type(config),
            *(
                _without_numbers(getattr(config, field.name))
                for field in dataclasses.fields(config)
                if field.name not in _WITHOUT_SIZE
            ),
        ]
    if isinstance(config, list | tuple):
        return [_without_numbers(value) for value in config]
    return config


def _renumbered(stage: Stage, numbers: dict[int, int]) -> Stage:
    """Copy a stage with other numbers of its decoder layers."""
    return dataclasses.replace(
        stage,
        moe_layers=tuple(numbers[number] for number in stage.moe_layers),
        blocks=tuple(
            dataclasses.replace(
                block, moe_layer=None if block.moe_layer is None else numbers[block.moe_layer]
            )
            for block in stage.blocks
        ),
    )
