"""Supervised fine-tuning on chats with padding: ``python examples/fine_tuning.py``.

torchtitan's chat loader packs conversations into rows and pads the end of a row. Padding is
dispatched to experts and costs time, so it counts in the load. Losses and expert bias ignore it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TrainingConfig

from examples.chat_data import loader_config, write_chats
from model_registry.qwen3 import model_registry
from titan_moe_lb import GlobalBatchAuxLoss, attach, build_model
from titan_moe_lb.balancing.valid_tokens.loader import with_token_mask

SEQ_LEN, ROWS = 128, 4


def main(steps: int = 10) -> list[dict[str, float]]:
    """Train on answers; return loss and balance of each step."""
    spec = model_registry("tiny", aux_losses=[GlobalBatchAuxLoss.Config(weight=0.1)])
    training = TrainingConfig(seq_len=SEQ_LEN, mixed_precision_param="float32")
    model, parallel_dims, train_context = build_model(spec, training=training, seed=0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balance = attach(model, optimizer, parallel_dims, rows_per_step=ROWS * ranks, padded=True)
    batches = chats(rank, ranks)
    history = []
    for step in range(1, steps + 1):
        inputs, labels = next(batches)
        tokens = inputs.pop("input")
        # The mean is over the answers of all ranks: prompts and padding have no label.
        answers = torch.tensor(int((labels != IGNORE_INDEX).sum()))
        dist.all_reduce(answers)
        with train_context():
            masks = model.get_attention_masks(inputs["positions"])
            logits = model(tokens, attention_masks=masks, **inputs)  # positions, valid_tokens
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            (loss / answers).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / answers
        dist.all_reduce(total)
        history.append({"loss": float(total), **balance.metrics()})
        if rank == 0:
            now = history[-1]
            print(
                f"step {step:2}  loss {now['loss']:.4f}  MaxVio {now['moe/max_violation']:.3f}  "
                f"padding {now['moe/padding_share']:.0%}"
            )
    return history


def chats(rank: int, ranks: int):
    """Yield the batches of this rank: inputs (input, positions, valid_tokens) and labels."""
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(folder))
        tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=f"{folder}/tokenizer")
        config = with_token_mask(loader_config(folder), documents=False)
        yield from config.build(
            dp_world_size=ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=SEQ_LEN,
            local_batch_size=ROWS,
        )


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
