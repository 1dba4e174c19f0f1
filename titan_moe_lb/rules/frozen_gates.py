"""Rule of gates that were frozen when a checkpoint was saved."""

from __future__ import annotations

from titan_moe_lb.checkpoints.resume_point import is_model_only
from titan_moe_lb.errors import JobError
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules.layer_names import layer_name


def checkpoint_has_state_of_gates(job: Job) -> None:
    """Check that a checkpoint to resume from has optimizer state of each gate that learns.

    torchtitan raises in every process where it is missing. State of a gate that the job freezes is
    left out.
    """
    start = job.start
    if start is None or is_model_only(job.config, start):
        return
    saved = [name for name in start.metadata.state_dict_metadata if name.startswith("optimizer.")]
    if not saved or "optimizer" in job.config.checkpoint.exclude_from_loading:
        return
    for name, parameter in job.meta_model.named_parameters():
        learns = parameter.requires_grad and ".router.gate." in name
        if learns and not any(f".{name}." in one for one in saved):
            raise JobError(
                f"{start.path} was saved with the gate of {layer_name(name)} frozen, so it has no "
                "optimizer state to train it: keep it in [model] freeze.gate, or name the checkpoint "
                "in checkpoint.initial_load_path of a run in another dump_folder, which loads the "
                "weights alone"
            )
