"""Job that starts from a Hugging Face folder: its logits, weights and export."""

from __future__ import annotations

import os

import torch
from torch.distributed.tensor import DTensor

from tests.support.train_jobs import build
from titan_moe_lb.job import job_config


def logits_and_export(
    arguments: list[str], folder: str, out_folder: str, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Load a folder of safetensors as a job would, run it, and write it out again.

    Args:
        arguments: command line of the job.
        folder: folder with a ``model.safetensors`` and a ``config.json``.
        out_folder: folder in which the job writes.
        tokens: ``(B, L)``.

    Returns:
        Logits ``(B, L, V)`` in training and in eval mode, and the folder of the written weights.
    """
    job = job_config.load(
        [
            *arguments,
            f"--training.local_batch_size={tokens.shape[0]}",
            f"--training.seq_len={tokens.shape[1]}",
            "--training.mixed_precision_param=float32",
            *_from_and_to(folder, out_folder),
        ]
    )
    job.config.override.imports.append("tests.parity.float32_experts.float32_experts")
    trainer = build(job.config)
    trainer.checkpointer.load()
    (model,) = trainer.model_parts
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    inputs, _labels, extra = trainer.post_dataloading_process(
        {"input": tokens, "positions": positions}, tokens
    )
    logits = []
    for training in (True, False):
        with torch.no_grad(), trainer.train_context():
            logits.append(model.lm_head(model.train(training)(inputs, **extra)))
    trainer.checkpointer.save(curr_step=1, last_step=True)
    trainer.close()
    return logits[0], logits[1], os.path.join(out_folder, "checkpoint", "step-1")


def weights_and_export(
    arguments: list[str], folder: str, out_folder: str
) -> tuple[dict[str, torch.Tensor], str]:
    """Load a folder of safetensors under any layout and write it out again. Every rank.

    Returns:
        The whole parameters of this rank's stages, and the folder of the written weights.
    """
    job = job_config.load([*arguments, *_from_and_to(folder, out_folder)])
    trainer = build(job.config)
    trainer.checkpointer.load()
    state = {k: v for part in trainer.model_parts for k, v in part.state_dict().items()}
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in state.items()
    }
    trainer.checkpointer.save(curr_step=1, last_step=True)
    trainer.close()
    return weights, os.path.join(out_folder, "checkpoint", "step-1")


def _from_and_to(folder: str, out_folder: str) -> list[str]:
    return [
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        f"--checkpoint.initial_load_path={folder}",
        "--checkpoint.last_save_in_hf",
        "--checkpoint.last_save_model_only",
        f"--dump_folder={out_folder}",
        "--debug.no-enable-structured-logging",
    ]
