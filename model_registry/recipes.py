"""Jobs from which config functions start: a debug run and a pre-training run."""

from __future__ import annotations

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from titan_moe_lb.data import CORPUS, TOKENIZER_PATH, domains, loaders
from titan_moe_lb.telemetry.domain_validator import DomainValidator
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor


def language_model_loss(spec: ModelSpec) -> BaseLoss.Config:
    """Return the cross entropy of the next token, computed in chunks of the sequence."""
    return ChunkedLossWrapper.Config(
        loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    )


def debug(
    spec: ModelSpec,
    loss: BaseLoss.Config | None = None,
    *,
    local_batch_size: int = 8,
    seq_len: int = 256,
) -> Trainer.Config:
    """Return a job of ten logged steps on text that comes with Python, with a fixed seed."""
    return Trainer.Config(
        loss=loss or language_model_loss(spec),
        hf_assets_path=TOKENIZER_PATH,
        metrics=LoadBalanceMetricsProcessor.Config(log_freq=1),
        model_spec=spec,
        dataloader=loaders.text(CORPUS),
        validator=DomainValidator.Config(
            dataloader=loaders.text(CORPUS, infinite=False),
            domains=[domains.held_out(domain) for domain in domains.DOMAINS],
            steps=2,
        ),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=2, decay_ratio=0.8, decay_type="linear", min_lr_factor=0.0
        ),
        # torchtitan cannot capture the standard EP dispatcher or a pipeline
        # schedule in a CUDA graph.
        training=TrainingConfig(
            local_batch_size=local_batch_size,
            seq_len=seq_len,
            steps=10,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(),
        checkpoint=CheckpointManager.Config(interval=10, last_save_model_only=False),
        activation_checkpoint=None,
        debug=DebugConfig(seed=42),
    )


def pretraining(
    spec: ModelSpec,
    loss: BaseLoss.Config | None = None,
    *,
    assets: str,
    learning_rate: float = 2.2e-4,
    expert_parallel: int = 8,
    local_batch_size: int = 4,
    seq_len: int = 4096,
    activation_checkpoint: SelectiveAC.Config | FullAC.Config | None = None,
) -> Trainer.Config:
    """Return a job on C4 over many GPUs; job files set the rest of the layout.

    Args:
        spec: the model.
        loss: default: :func:`language_model_loss`.
        assets: folder of the model's tokenizer, and of its weights if a job starts from them.
        learning_rate: peak, reached after 2,000 steps. The default, for models without a published
            one, is DeepSeek-V3's (arXiv 2412.19437, section 4.2).
        expert_parallel: expert-parallel degree.
        local_batch_size: sequences of a data-parallel rank in a forward.
        seq_len: tokens of a sequence.
        activation_checkpoint: default: selective.
    """
    return Trainer.Config(
        loss=loss or language_model_loss(spec),
        hf_assets_path=assets,
        metrics=LoadBalanceMetricsProcessor.Config(),
        model_spec=spec,
        dataloader=loaders.text("c4"),
        validator=DomainValidator.Config(),
        optimizer=default_adamw(lr=learning_rate),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=2000, decay_ratio=0.8, decay_type="cosine", min_lr_factor=0.1
        ),
        training=TrainingConfig(
            local_batch_size=local_batch_size,
            seq_len=seq_len,
            steps=10000,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            pipeline_parallel_schedule="Interleaved1F1B",
            expert_parallel_degree=expert_parallel,
        ),
        checkpoint=CheckpointManager.Config(interval=500),
        activation_checkpoint=activation_checkpoint or SelectiveAC.Config(),
        compile=CompileConfig(enable=True, components=["loss"]),
    )
