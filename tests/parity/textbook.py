"""Gradient of ``main + weight * textbook loss`` by plain autograd on torchtitan's own router.

Nothing of this package is on the path of these gradients. The routers are torchtitan's, and the
losses are the papers' formulas on the routers' results.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.config.override import derive
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.trainer import Trainer

from tests.parity.gradients import build_from_seed, gather_gradients, global_batch
from tests.parity.layout import Layout
from tests.support.textbook import mean_loss, sequence_counts
from titan_moe_lb.balancing.router import LoadBalancedRouter


def textbook_gradients(
    seed_folder: str,
    out_folder: str,
    *,
    module: str,
    config: str,
    model: dict[str, Any],
    weight: float,
) -> dict[str, str]:
    """Save one gradient file for each loss; return their paths. One rank."""
    trainer = build_from_seed(
        seed_folder, out_folder, Layout(), module, config, model, _with_upstream_routers
    )
    routers = [m for m in trainer.model_parts[0].modules() if isinstance(m, TokenChoiceTopKRouter)]
    assert routers and all(type(router) is TokenChoiceTopKRouter for router in routers)
    # Each pass is a step: torchtitan's own hook moves the expert bias, and the counts become
    # the previous ones.
    register_moe_load_balancing_hook(trainer.optimizers, trainer.model_parts, trainer.parallel_dims)
    seen = _forward(trainer, routers)[1]
    trainer.optimizers.step()
    files = {}
    for kind in ("sequence_wise", "global_batch", "z_loss"):
        previous = [sequence_counts(ids, scores.shape[-1]).sum(0) for _logits, scores, ids in seen]
        trainer.optimizers.zero_grad()
        main, seen = _forward(trainer, routers)
        losses = [
            mean_loss(kind, logits, scores, ids, counts if kind == "global_batch" else None)
            for (logits, scores, ids), counts in zip(seen, previous, strict=True)
        ]
        (main + weight * sum(losses)).backward()
        files[kind] = os.path.join(out_folder, f"{kind}.pt")
        torch.save(gather_gradients(trainer), files[kind])
        trainer.optimizers.step()
    trainer.close()
    return files


def _with_upstream_routers(config: Trainer.Config) -> None:
    assert config.model_spec is not None
    for _fqn, router, parent, name in list(config.model_spec.traverse(LoadBalancedRouter.Config)):
        setattr(parent, name, derive(router, TokenChoiceTopKRouter.Config))


def _forward(trainer: Trainer, routers: list) -> tuple[torch.Tensor, list[tuple]]:
    """Compute the main loss of the fixed batch, and (logits, scores, ids) of each router."""
    logits, outputs = [], []
    hooks = [r.gate.register_forward_hook(lambda _m, _i, out: logits.append(out)) for r in routers]
    hooks += [r.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for r in routers]
    batch = global_batch(Layout().sequence_length)
    tokens, labels, positions = (part.to(trainer.device) for part in batch)
    inputs, targets, extra = trainer.post_dataloading_process(
        {"input": tokens, "positions": positions}, labels
    )
    model = trainer.model_parts[0]
    with trainer.train_context():
        hidden = model(inputs, **extra)
        predicted = model.lm_head(hidden)
    for hook in hooks:
        hook.remove()
    main = F.cross_entropy(predicted.flatten(0, 1), targets.flatten())
    seen = [
        (logit, scores, ids) for logit, (_topk, ids, scores) in zip(logits, outputs, strict=True)
    ]
    return main, seen
