"""Pipeline stages of a job by the names of their modules, before a model is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torchtitan.distributed import pipeline_parallel

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layout import Layout


def all_modules(num_layers: int) -> list[str]:
    """List the names of the modules that stages consist of, in the order of the model."""
    (names,) = pipeline_parallel._generate_llm_fqn_per_model_part(1, num_layers)
    return names


def modules_of_stages(layout: Layout, parallelism: Any, model: Any) -> list[list[str]]:
    """List the names of the modules of each stage.

    Raises:
        JobError: the model has fewer layers than stages.
        ValueError: from torchtitan, if the numbers of stages and ranks do not fit.
    """
    if parallelism.module_fqns_per_model_part is not None:
        return parallelism.module_fqns_per_model_part
    stages, layers, *weights = pipeline_parallel._get_pipeline_metadata(layout, parallelism, model)
    if stages > layers + sum(weights):
        raise JobError(
            f"parallelism.pipeline_parallel_degree {layout.pp} with the "
            f"{parallelism.pipeline_parallel_schedule} schedule makes {stages} stages of a model "
            f"of {layers} layers: use a smaller degree or a deeper model"
        )
    return pipeline_parallel._generate_llm_fqn_per_model_part(stages, layers, *weights)


def stages_of_rank(position: int, layout: Layout, parallelism: Any, num_stages: int) -> list[int]:
    """List the stages of a pipeline rank, ascending."""
    return sorted(
        pipeline_parallel._get_pp_rank_to_stage_indices_mapping(
            position, layout.pp, parallelism.pipeline_parallel_schedule, num_stages
        )
    )


def cuts_by_name(pipeline: Callable[..., tuple]) -> bool:
    """Return True if a ``ModelSpec.pipelining_fn`` assigns decoder layers as this module does."""
    known = (pipeline_parallel.pipeline_llm, pipeline_parallel.pipeline_vlm)
    return inspect.unwrap(pipeline) in known
