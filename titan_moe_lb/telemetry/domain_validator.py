"""Validation on held-out text of several domains: loss of each, and the experts that it uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator

from titan_moe_lb.balancing.router import LoadBalancedRouter, routers_of
from titan_moe_lb.parallel.local_shard import local_shard
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor
from titan_moe_lb.telemetry.reduction import reduce_counts
from titan_moe_lb.traces.balance_statistics import mark_absent
from titan_moe_lb.traces.domain_trace import DomainLoad


class DomainValidator(Validator):
    """torchtitan's validation once for each domain; without domains it is torchtitan's.

    The loss that is logged is the mean over the domains. Each domain's own loss and MaxVio go to
    the sinks, and with the tokens of every expert to ``domains.arrow`` in the run's folder.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        domains: list[str] = field(default_factory=list)
        """Datasets to validate on, one after the other, each in place of dataloader.dataset."""

    metrics_processor: MetricsProcessor | _CaughtLoss
    dl_config: Any

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate on each domain. Collective: torchtitan calls it on every rank."""
        domains = self.config.domains
        if not domains:
            super().validate(model_parts, step)
            return
        metrics, dataloader = self.metrics_processor, self.dl_config
        assert isinstance(metrics, LoadBalanceMetricsProcessor), "the rules of a job refuse another"
        routers = routers_of(model_parts)
        loads: dict[str, DomainLoad] = {}
        for domain in domains:
            caught = _CaughtLoss(metrics)
            self.metrics_processor = caught
            self.dl_config = replace(dataloader, dataset=domain)
            for router in routers:
                device = local_shard(router.gate.weight).device
                router.held_out_counts_E = torch.zeros(
                    router.num_experts, dtype=torch.int64, device=device
                )
            try:
                super().validate(model_parts, step)
                loads[domain] = DomainLoad(loss=caught.loss, counts_ME=self._counts(routers))
            finally:
                self.metrics_processor, self.dl_config = metrics, dataloader
                for router in routers:
                    router.held_out_counts_E = None
        metrics.log_domains(loads, step)

    def _counts(self, routers: list[LoadBalancedRouter]) -> np.ndarray:
        """Counts of the domain over all ranks and stages ``(M, E)``."""
        counts_NE, groups = None, RankGroups.of(self.parallel_dims)
        if routers:
            stacked = torch.nn.utils.rnn.pad_sequence(
                [router.held_out_counts_E for router in routers],  # type: ignore[misc]
                batch_first=True,
            )
            for group in groups.tokens:
                dist.all_reduce(stacked, group=group)
            num_experts_N = np.array([router.num_experts for router in routers])
            counts_NE = mark_absent(stacked.cpu().numpy(), num_experts_N)
        numbers = [router.layer for router in routers]
        return reduce_counts(numbers, counts_NE, groups)


class _CaughtLoss:
    """Metrics processor that saves the loss of one domain instead of logging it."""

    def __init__(self, metrics: LoadBalanceMetricsProcessor) -> None:
        self._metrics = metrics
        self.loss = float("nan")

    @property
    def ntokens_since_last_log(self) -> int:
        return self._metrics.ntokens_since_last_log

    @ntokens_since_last_log.setter
    def ntokens_since_last_log(self, number: int) -> None:
        self._metrics.ntokens_since_last_log = number

    def log_validation(self, loss: float, step: int) -> None:
        self.loss = loss
