"""Direct preference optimization with a frozen reference: ``python examples/dpo.py``.

The policy learns to prefer a text to the same words in another order (loss: arXiv 2305.18290,
Eq. 7). The reference is a second model without ``attach()``, so its forwards do not affect the
balance of the policy.
"""

from __future__ import annotations

import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import TrainingConfig

from model_registry.deepseek_v3 import model_registry
from titan_moe_lb import SequenceWiseAuxLoss, attach, build_model
from titan_moe_lb.data import TOKENIZER_PATH, documents

SEQ_LEN, PAIRS, BETA = 64, 3, 0.5


def main(steps: int = 10) -> list[dict[str, float]]:
    """Train the policy; return loss and balance of each step."""
    spec = model_registry("tiny", aux_losses=[SequenceWiseAuxLoss.Config(weight=1e-3)])
    training = TrainingConfig(seq_len=SEQ_LEN, mixed_precision_param="float32")
    policy, parallel_dims, train_context = build_model(spec, training=training, seed=0)
    same = build_model(spec, training=training, parallel_dims=parallel_dims, seed=0)
    reference = same.model.requires_grad_(False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    # A pair is two rows; rows of unequal length are padded.
    balance = attach(policy, optimizer, parallel_dims, rows_per_step=2 * PAIRS * ranks, padded=True)
    pairs = Pairs(rank)
    history = []
    for step in range(1, steps + 1):
        tokens, valid = pairs.batch()
        with train_context():
            with torch.no_grad():
                expected = log_probabilities(reference, tokens, valid)
            gained = log_probabilities(policy, tokens, valid) - expected
            chosen, rejected = gained.chunk(2)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).sum() / (PAIRS * ranks)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        history.append({"loss": float(total), **balance.metrics()})
        if rank == 0:
            now = history[-1]
            print(
                f"step {step:2}  loss {now['loss']:.4f}  MaxVio {now['moe/max_violation']:.3f}  "
                f"padding {now['moe/padding_share']:.0%}"
            )
    return history


def log_probabilities(
    model: torch.nn.Module, tokens: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Return the log-probability of each row, over its valid tokens but the first, ``(B,)``."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    masks = model.get_attention_masks(positions)
    # The balance needs the token mask. The reference has no balance, so it needs no mask.
    marks = {"valid_tokens": valid} if torch.is_grad_enabled() else {}
    logits = model(tokens, attention_masks=masks, positions=positions, **marks)
    scores = logits[:, :-1].float().log_softmax(-1)
    of_tokens = scores.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    return (of_tokens * valid[:, 1:]).sum(dim=1)


class Pairs:
    """Pairs of a text and the same words in another order, of unequal length."""

    def __init__(self, rank: int) -> None:
        self.random = random.Random(rank)
        tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=TOKENIZER_PATH)
        self.encode = tokenizer.encode

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return chosen rows, then rejected rows, and the mask of valid tokens, ``(2 PAIRS, S)``."""
        chosen, rejected = [], []
        for text in self.random.sample(documents()[:60], PAIRS):
            words = text.split()[: self.random.randint(8, 20)]
            chosen.append(self.encode(" ".join(words))[:SEQ_LEN])
            rejected.append(self.encode(" ".join(self.random.sample(words, len(words))))[:SEQ_LEN])
        rows = [torch.tensor(row) for row in chosen + rejected]
        tokens = torch.zeros(len(rows), SEQ_LEN, dtype=torch.int64)
        for row, filled in zip(rows, tokens, strict=True):
            filled[: len(row)] = row
        lengths = torch.tensor([len(row) for row in rows])
        return tokens, torch.arange(SEQ_LEN) < lengths.unsqueeze(1)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
