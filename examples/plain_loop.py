"""Plain PyTorch loop on a model of the registry: ``python examples/plain_loop.py``.

``torchrun --nproc-per-node 2 examples/plain_loop.py`` runs it on two processes. The rows of a step
are cut into micro-batches of different sizes, as in a loop that fills the memory.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TrainingConfig

from model_registry.deepseek_v3 import model_registry
from titan_moe_lb import RouterZLoss, SequenceWiseAuxLoss, SignBias, attach, build_model
from titan_moe_lb.data import TOKENIZER_PATH, documents

SEQ_LEN, ROWS = 128, 6
MICRO_BATCHES = (3, 1, 2)
"""Rows of each forward of a rank."""


def main(steps: int = 10) -> list[dict[str, float]]:
    """Train on Python's documentation; return loss and balance of each step."""
    spec = model_registry(
        "tiny",
        aux_losses=[SequenceWiseAuxLoss.Config(weight=1e-2), RouterZLoss.Config(weight=1e-4)],
        expert_bias=SignBias.Config(speed=1e-2),
    )
    training = TrainingConfig(seq_len=SEQ_LEN, mixed_precision_param="float32")
    model, parallel_dims, train_context = build_model(spec, training=training, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    balance = attach(model, optimizer, parallel_dims, rows_per_step=ROWS * dist.get_world_size())
    rows = text()
    positions = torch.arange(SEQ_LEN)
    history = []
    for step in range(1, steps + 1):
        total = torch.zeros(())
        for size in MICRO_BATCHES:
            batch = torch.stack([next(rows) for _ in range(size)])
            inputs, labels = batch[:, :-1], batch[:, 1:]
            places = positions.expand_as(inputs)
            with train_context():
                masks = model.get_attention_masks(places)
                logits = model(inputs, attention_masks=masks, positions=places)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
                # torchtitan sums gradients over ranks, so this loss is divided by all rows.
                (loss * size / (ROWS * dist.get_world_size())).backward()
            total += loss.detach() * size / ROWS
        optimizer.step()  # ends the step of the balance first
        optimizer.zero_grad()
        dist.all_reduce(total)
        history.append({"loss": float(total) / dist.get_world_size(), **balance.metrics()})
        if dist.get_rank() == 0:
            now = history[-1]
            print(
                f"step {step:2}  loss {now['loss']:.4f}  MaxVio {now['moe/max_violation']:.3f}  "
                f"sequence-wise {now['moe/seq_load_balancing_loss']:.4f}"
            )
    return history


def text():
    """Yield rows of this rank, one token longer than a sequence, without end."""
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=TOKENIZER_PATH)
    tokens = torch.tensor([token for text in documents()[:60] for token in tokenizer.encode(text)])
    rows = tokens.unfold(0, SEQ_LEN + 1, SEQ_LEN)
    number = dist.get_rank()
    while True:
        yield rows[number % len(rows)]
        number += dist.get_world_size()


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
