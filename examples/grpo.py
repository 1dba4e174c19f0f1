"""Group-relative policy optimization with replayed routing: ``python examples/grpo.py``.

The policy samples groups of completions of unequal length, and is rewarded for certain tokens. It
trains twice on each batch, with the clipped loss of arXiv 2402.03300, Eq. 3. The forward that
scores a rollout records the experts of its tokens. The training forwards use them again (arXiv
2510.11370), in micro-batches that are sorted by length.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchtitan.config import TrainingConfig

from model_registry.qwen3 import model_registry
from titan_moe_lb import GlobalBatchAuxLoss, RoutingReplay, attach, build_model

PROMPT, NEW, GROUPS, GROUP_SIZE, EPOCHS, CLIP = 4, 8, 2, 16, 2, 0.3
ROWS = GROUPS * GROUP_SIZE
REWARDED = range(0, 1024)
"""Tokens for which the policy is rewarded."""


def main(steps: int = 8) -> list[dict[str, float]]:
    """Sample, score and train; return reward, loss and balance of each step."""
    spec = model_registry("tiny", aux_losses=[GlobalBatchAuxLoss.Config(weight=1e-3)])
    training = TrainingConfig(seq_len=PROMPT + NEW, mixed_precision_param="float32")
    model, parallel_dims, train_context = build_model(spec, training=training, seed=0)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    balance = attach(model, optimizer, parallel_dims)
    replay = RoutingReplay(balance)
    dice = torch.Generator().manual_seed(rank)
    history = []
    for step in range(1, steps + 1):
        with train_context(), torch.no_grad():  # does not affect the balance
            tokens, lengths = rollout(model, dice)
            ids = torch.arange(ROWS).unsqueeze(1).expand_as(tokens)
            with replay.record():
                before = log_probabilities(model, tokens, sample_ids=ids)
        reward = rewards(tokens, lengths)
        of_group = reward.view(GROUPS, GROUP_SIZE)
        spread = of_group.std(dim=1, keepdim=True) + 1e-4
        advantage = ((of_group - of_group.mean(dim=1, keepdim=True)) / spread).flatten()
        for _ in range(EPOCHS):
            balance.begin_step(ROWS * ranks)
            loss = torch.zeros(())
            for rows in lengths.argsort().split(8):  # cut to the longest of eight rows
                end = PROMPT + int(lengths[rows].max())
                with train_context(), replay.replay():
                    after = log_probabilities(model, tokens[rows, :end], sample_ids=ids[rows, :end])
                    ratio = (after - before[rows, : end - 1]).exp()
                    gain = torch.minimum(
                        ratio * advantage[rows, None],
                        ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[rows, None],
                    )
                    answer = completions(lengths[rows], end)
                    means = (gain * answer).sum(dim=1) / lengths[rows]
                    part = -means.sum() / (ROWS * ranks)
                    part.backward()
                loss += part.detach()
            optimizer.step()
            optimizer.zero_grad()
        numbers = torch.stack([reward.mean() / ranks, loss])
        dist.all_reduce(numbers)
        metrics = {**balance.metrics(), **replay.metrics()}
        replay.forget()
        history.append({"reward": float(numbers[0]), "loss": float(numbers[1]), **metrics})
        if rank == 0:
            now = history[-1]
            print(
                f"step {step:2}  reward {now['reward']:.3f}  MaxVio {now['moe/max_violation']:.3f}  "
                f"changed experts {now['moe/replay_changed_share']:.1%}"
            )
    return history


def rollout(model: torch.nn.Module, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample rows ``(ROWS, S)``, and the lengths of their completions ``(ROWS,)``."""
    prompts = torch.randint(0, 256, (GROUPS, PROMPT), generator=dice)
    tokens = prompts.repeat_interleave(GROUP_SIZE, dim=0)
    for _ in range(NEW):
        chances = forward(model, tokens)[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=dice)], dim=1)
    return tokens, torch.randint(NEW // 2, NEW + 1, (ROWS,), generator=dice)


def rewards(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the share of rewarded tokens in each completion ``(ROWS,)``."""
    liked = (tokens[:, 1:] >= REWARDED.start) & (tokens[:, 1:] < REWARDED.stop)
    return (liked * completions(lengths, tokens.shape[1])).sum(dim=1) / lengths


def completions(lengths: torch.Tensor, end: int) -> torch.Tensor:
    """Mark the completion among the tokens 1 to ``end - 1``, bool ``(B, end - 1)``."""
    index = torch.arange(1, end)
    return (index >= PROMPT) & (index < PROMPT + lengths.unsqueeze(1))


def log_probabilities(model: torch.nn.Module, tokens: torch.Tensor, **marks) -> torch.Tensor:
    """Return the log-probability of every token but the first, ``(B, S - 1)``."""
    scores = forward(model, tokens, **marks)[:, :-1].float().log_softmax(-1)
    return scores.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


def forward(model: torch.nn.Module, tokens: torch.Tensor, **marks) -> torch.Tensor:
    """Return the logits ``(B, S, vocabulary)``."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    masks = model.get_attention_masks(positions)
    return model(tokens, attention_masks=masks, positions=positions, **marks)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
