"""Pipeline ranks that are alike: one is built, and the others have the sizes that a build has."""

from __future__ import annotations

import pytest
from torchtitan.models.deepseek_v3 import model_registry

from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb.commands.plan.building import silent_build
from titan_moe_lb.costmodel.jobs import read_job as module
from titan_moe_lb.costmodel.jobs.pipeline_positions import Position
from titan_moe_lb.costmodel.times.job import JobModel
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.wiring.model_spec import balanced

RANKS = 8
LAYERS = 6
"""Decoder layers of the debug model, of which the first is dense."""


def job(parallelism: dict) -> Job:
    config = deepseek_v3_tiny()
    config.model_spec = balanced(model_registry("debugmodel"), expert_bias=None)
    assert len(config.model_spec.model.layers) == LAYERS
    config.training.local_batch_size = 8
    for name, value in parallelism.items():
        setattr(config.parallelism, name, value)
    return Job.of(config, RANKS)


def read(parallelism: dict, every_rank: bool) -> tuple[JobModel, int]:
    """Sizes of a job, and the number of its ranks that were built.

    With ``every_rank``, each is built, with all layers of the model.
    """
    built: list[int] = []
    build, positions_of = module.build_parts, module.positions_of

    def counted(config, model, position):
        built.append(position)
        return build(config, model, position)

    def each_on_its_own(job: Job) -> list[Position]:
        return [Position(None, position) for position in range(job.layout.pp)]

    module.build_parts = counted
    module.positions_of = each_on_its_own if every_rank else positions_of
    try:
        with silent_build():
            return module.read_job(job(parallelism)), len(built)
    finally:
        module.build_parts, module.positions_of = build, positions_of


@pytest.mark.parametrize(
    ("pp", "schedule", "more", "kinds"),
    [
        (2, "1F1B", {}, 2),
        # embeddings and dense layer | 2 layers | 2 layers | 1 layer and the head
        (4, "1F1B", {"expert_parallel_degree": 2}, 3),
        # embeddings | dense layer | 5 layers | head; rank n has stages n and n + 4: all differ
        (4, "Interleaved1F1B", {}, 4),
        (4, "ZBVZeroBubble", {"tensor_parallel_degree": 2}, 3),
        (
            2,
            "1F1B",
            {
                "module_fqns_per_model_part": [
                    ["tok_embeddings", "layers.0"],
                    [f"layers.{number}" for number in range(1, LAYERS)] + ["norm", "lm_head"],
                ]
            },
            2,
        ),
    ],
)
def test_sizes_are_those_of_a_build_of_every_rank(ranks, pp, schedule, more, kinds):
    parallelism = {
        "pipeline_parallel_degree": pp,
        "pipeline_parallel_schedule": schedule,
        "data_parallel_shard_degree": -1,
        **more,
    }
    ((found, built),) = ranks.run(1, read, parallelism, False)
    ((every, of_all),) = ranks.run(1, read, parallelism, True)
    assert found == every
    assert (built, of_all) == (kinds, pp)
