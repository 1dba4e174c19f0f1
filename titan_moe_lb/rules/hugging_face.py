"""Check of Hugging Face weights against the model, before any process starts."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch

from titan_moe_lb.errors import JobError
from titan_moe_lb.parallel.layer_numbers import moe_layers
from titan_moe_lb.resolved_job import Job


def initial_weights_fit(job: Job) -> None:
    """Compare the names and shapes of the weights that a job starts from with its model.

    This reads only the headers of the files and builds the model on the meta device.
    """
    checkpoint, spec = job.config.checkpoint, job.config.model_spec
    if not checkpoint.enable or not checkpoint.initial_load_in_hf:
        return
    if job.start is not None:  # a distributed checkpoint takes precedence
        return
    assert spec is not None
    if spec.state_dict_adapter is None:
        raise JobError(
            f"checkpoint.initial_load_in_hf: {spec.name} cannot be read from a Hugging Face "
            "checkpoint: it has no state-dict adapter"
        )
    folder = checkpoint.initial_load_path or job.config.hf_assets_path
    found = _shapes(Path(folder))
    if not found:
        raise JobError(
            f"checkpoint.initial_load_in_hf: {folder!r} contains no *.safetensors file; name the "
            "folder of the weights in checkpoint.initial_load_path"
        )
    if checkpoint.initial_load_in_hf_quantized:
        # Blocks have other names and shapes; the adapter raises if it cannot read them.
        spec.state_dict_adapter(spec.model, None).get_hf_storage_reader(folder, from_quantized=True)
        return
    for name in _biases_without_use(job):
        if name in found:
            raise JobError(
                f"checkpoint.initial_load_in_hf: {folder!r} holds an expert bias ({name!r}) and "
                "this job has none, which would drop it: keep it with expert_bias = {type = "
                '"frozen"}, or leave it behind with {type = "frozen", reset = true}'
            )
    for name, shape in _expected_shapes(job).items():
        if f"{name}_blocks" in found:
            raise JobError(
                f"checkpoint.initial_load_in_hf: {folder!r} holds {name!r} in quantized blocks; "
                "write the checkpoint out in bfloat16 first"
            )
        if name not in found:
            raise JobError(
                f"checkpoint.initial_load_in_hf: {folder!r} has no tensor {name!r}, which has "
                f"shape {shape} in {spec.name} {spec.flavor}: is it another model or flavor?"
            )
        if found[name] != shape:
            raise JobError(
                f"checkpoint.initial_load_in_hf: {name!r} has shape {found[name]} in {folder!r} "
                f"and {shape} in {spec.name} {spec.flavor}: is it another model or flavor?"
            )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (OSError, safetensors.SafetensorError) as error:
            raise JobError(f"{path} cannot be read as safetensors: {error}") from None
    return shapes


def _biases_without_use(job: Job) -> list[str]:
    """Return the Hugging Face names of expert biases that the job does not have."""
    spec = job.config.model_spec
    assert spec is not None and spec.state_dict_adapter is not None
    adapter = spec.state_dict_adapter(spec.model, job.config.hf_assets_path)
    biases = {
        f"{fqn}.expert_bias_E": torch.empty(moe.num_experts, device="meta")
        for fqn, moe in moe_layers(spec.model).items()
        if moe.load_balance_coeff is None
    }
    return list(adapter.to_hf(biases))


def _expected_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    spec = job.config.model_spec
    assert spec is not None and spec.state_dict_adapter is not None
    # torchtitan passes this folder too; an adapter may choose names by the index in it.
    adapter = spec.state_dict_adapter(job.bound.model_spec.model, job.config.hf_assets_path)
    return {
        name: tuple(value.shape)
        for name, value in adapter.to_hf(job.meta_model.state_dict()).items()
    }
