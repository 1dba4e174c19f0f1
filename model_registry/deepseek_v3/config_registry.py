"""Config functions of DeepSeek-V3, under the names that torchtitan's users know."""

from __future__ import annotations

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.deepseek_v3 import MTPLoss
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from model_registry.deepseek_v3 import model_registry
from titan_moe_lb.data import CORPUS, TOKENIZER_PATH
from titan_moe_lb.telemetry.metrics import LoadBalanceMetricsProcessor

debug_config = "deepseek_v3_debugmodel"
"""The job that runs when none is named."""


def loss_config(spec: ModelSpec) -> BaseLoss.Config:
    """The language-model loss that fits a model of this registry entry."""
    vocab_size = decoder_vocab_size(spec)
    if spec.model.mtp_layers:
        return MTPLoss.Config(global_vocab_size=vocab_size)
    return ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=vocab_size))


def deepseek_v3_tiny() -> Trainer.Config:
    """A few seconds on a laptop: for tests."""
    config = _debug("tiny")
    config.training.seq_len = 128
    return config


def deepseek_v3_debugmodel() -> Trainer.Config:
    """Under a minute on a laptop, on text that comes with Python."""
    return _debug("debugmodel")


def deepseek_v3_debugmodel_mtp() -> Trainer.Config:
    """The debug model with one multi-token prediction layer."""
    return _debug("debugmodel", num_mtp_layers=1)


def deepseek_v3_16b() -> Trainer.Config:
    config = _pretraining("16B", "./assets/hf/deepseek-moe-16b-base", expert_parallel=8)
    config.training.steps = 1000
    return config


def deepseek_v3_236b() -> Trainer.Config:
    return _pretraining("236B", "./assets/hf/DeepSeek-V2", expert_parallel=8)


def deepseek_v3_671b() -> Trainer.Config:
    return _pretraining("671B", "./assets/hf/DeepSeek-V3.1-Base", expert_parallel=64)


def _debug(flavor: str, **model_arguments) -> Trainer.Config:
    spec = model_registry(flavor, **model_arguments)
    return Trainer.Config(
        loss=loss_config(spec),
        hf_assets_path=TOKENIZER_PATH,
        metrics=LoadBalanceMetricsProcessor.Config(log_freq=1),
        model_spec=spec,
        dataloader=HuggingFaceTextDataLoader.Config(dataset=CORPUS),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=2, decay_ratio=0.8, decay_type="linear", min_lr_factor=0.0
        ),
        # torchtitan cannot capture the standard EP dispatcher or a pipeline
        # schedule in a CUDA graph.
        training=TrainingConfig(
            local_batch_size=8, seq_len=256, steps=10, disable_cuda_graphs=True
        ),
        parallelism=ParallelismConfig(),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
        activation_checkpoint=None,
    )


def _pretraining(flavor: str, assets: str, *, expert_parallel: int) -> Trainer.Config:
    spec = model_registry(flavor)
    return Trainer.Config(
        loss=loss_config(spec),
        hf_assets_path=assets,
        metrics=LoadBalanceMetricsProcessor.Config(),
        model_spec=spec,
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        # Peak learning rate and warm-up: arXiv 2412.19437, section 4.2.
        optimizer=default_adamw(lr=2.2e-4),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=2000, decay_ratio=0.8, decay_type="cosine", min_lr_factor=0.1
        ),
        training=TrainingConfig(
            local_batch_size=4, seq_len=4096, steps=10000, disable_cuda_graphs=True
        ),
        parallelism=ParallelismConfig(
            pipeline_parallel_schedule="Interleaved1F1B",
            expert_parallel_degree=expert_parallel,
        ),
        checkpoint=CheckpointManager.Config(interval=500),
        activation_checkpoint=SelectiveAC.Config(),
        compile=CompileConfig(enable=True, components=["loss"]),
    )
