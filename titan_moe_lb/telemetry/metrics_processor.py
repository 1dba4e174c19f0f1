"""torchtitan's ``MetricsProcessor``, extended by MoE metrics and a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch.distributed as dist
import tyro
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from titan_moe_lb.balancing.router import LoadBalancedRouter, moe_layers_of, routers_of
from titan_moe_lb.parallel import batch_cut
from titan_moe_lb.parallel.layout import Layout
from titan_moe_lb.parallel.rank_groups import RankGroups
from titan_moe_lb.telemetry.console_line import console_line
from titan_moe_lb.telemetry.reduction import reduce_step
from titan_moe_lb.telemetry.sink_metrics import domain_metrics, sink_metrics
from titan_moe_lb.telemetry.trace_columns import columns_in
from titan_moe_lb.traces.domain_trace import DomainLoad, DomainTraceWriter
from titan_moe_lb.traces.routing_trace import RoutingTraceWriter
from titan_moe_lb.traces.run_info import RunInfo
from titan_moe_lb.traces.trace import TraceWriter


class LoadBalanceMetricsProcessor(MetricsProcessor):
    """Metrics processor that logs expert load to all sinks and the console, and records a trace."""

    filled_by_job: ClassVar[frozenset[str]] = frozenset({"run_info", "cut"})
    """Fields of the Config that the model config's ``update_from_config`` fills."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """Settings of the metrics."""

        track_moe_metrics: bool = True
        """Record the load of the experts and log it in every logged step."""

        moe_per_layer_logging: bool = False
        """Log every layer's own numbers as well, as moe/NAME_layer_NUMBER."""

        moe_extreme_experts: int = 4
        """Number of the hottest and of the coldest experts that each logged step names; 0: none."""

        router_gradients: bool = False
        """Measure the gradients of the model's loss and of the aux losses in each router."""

        router_gradients_every: int = 1
        """Measure them in every n-th logged step."""

        router_scores: bool = False
        """Record how sure each router is: margin, entropy, logits, flips of a bfloat16 gate."""

        write_moe_trace: bool = True
        """Write moe_load.arrow in dump_folder, which titan-moe-lb report and watch read."""

        record_routing_steps: list[int] = field(default_factory=list)
        """Steps whose routing is written to dump_folder/routing, token by token, for replay."""

        run_info: Annotated[RunInfo | None, tyro.conf.Suppress] = None
        """Description of the run in its traces. Filled by ``update_from_config`` of the model."""

        cut: Annotated[batch_cut.Cut | None, tyro.conf.Suppress] = None
        """Cut of the job's global batch. Filled by ``update_from_config`` of the model."""

    def __init__(
        self,
        config: Config,
        *,
        parallel_dims: ParallelDims,
        dump_folder: str = "./outputs",
        pp_schedule: str = "1F1B",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config,
            parallel_dims=parallel_dims,
            dump_folder=dump_folder,
            pp_schedule=pp_schedule,
            **kwargs,
        )
        self._writing = threading.RLock()
        self._groups = RankGroups.of(parallel_dims)
        self._trace: TraceWriter | None = None
        self._domains: DomainTraceWriter | None = None
        self._routing: RoutingTraceWriter | None = None
        if config.run_info is None:
            return
        here = dist.get_rank() == Layout.of_dims(parallel_dims).metrics_rank(pp_schedule)
        if config.track_moe_metrics and config.write_moe_trace and here:
            self._trace = TraceWriter(dump_folder, config.run_info)
            self._domains = DomainTraceWriter(dump_folder, config.run_info)
        if config.record_routing_steps:
            self._routing = RoutingTraceWriter(dump_folder, config.run_info, dist.get_rank())

    def should_log(self, step: int) -> bool:
        """Extend ``MetricsProcessor.should_log`` to steps whose routing is recorded."""
        return super().should_log(step) or step in self.config.record_routing_steps

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Extend ``MetricsProcessor.log`` by MoE metrics. Collective over all ranks.

        torchtitan divides the time since its last logged step by ``log_freq``. So a step that is
        due only for its routing is not logged: its routing alone is written.
        """
        assert self.model_parts is not None
        if self._routing is not None and step in self.config.record_routing_steps:
            with self._writing:
                self._record_routing(step, routers_of(self.model_parts))
        if not super().should_log(step):
            return
        metrics: dict[str, float] = {}
        if self.config.track_moe_metrics:
            load = reduce_step(moe_layers_of(self.model_parts), self._groups)
            columns = columns_in(load)
            metrics = sink_metrics(
                load,
                columns,
                num_extreme_experts=self.config.moe_extreme_experts,
                per_layer=self.config.moe_per_layer_logging,
            )
            if metrics.get("moe/padding_share") == 1:
                logger.warning(
                    f"step {step} had no valid token: aux losses and expert bias stay as they were"
                )
        with self._writing:
            if self._trace is not None:
                learning = self._learning(float(global_avg_loss), float(grad_norm))
                load = replace(load, step_columns=load.step_columns | learning)
                self._trace.write(step, load)
            super().log(
                step,
                global_avg_loss,
                global_max_loss,
                grad_norm,
                extra_metrics={**(extra_metrics or {}), **metrics},
            )
            if metrics:
                losses = [column.name for column in columns if column.is_aux_loss]
                logger.info(console_line(step, metrics, losses, self.color))

    def log_domains(self, loads: dict[str, DomainLoad], step: int) -> None:
        """Log a validation on several domains, and record it in ``domains.arrow``."""
        mean = sum(load.loss for load in loads.values()) / len(loads)
        with self._writing:
            if self._domains is not None:
                self._domains.write(step, loads)
            self.log_validation(loss=mean, step=step, extra_metrics=domain_metrics(loads))

    def stop(self) -> None:
        """Close from another thread than the one that logs, for good.

        What that thread is writing is finished. It waits when it logs the next step.
        """
        self._writing.acquire()
        self.close()

    def close(self) -> None:
        """Close the traces as well."""
        with self._writing:
            for writer in (self._trace, self._domains, self._routing):
                if writer is not None:
                    writer.close()
            super().close()

    def _learning(self, loss: float, grad_norm: float) -> dict[str, float]:
        """Compute the columns of :data:`LEARNING`, on the rank that has the loss.

        Tokens per second are computed as in torchtitan: tokens of this rank, divided by the number
        of ranks that share them. Seconds per step are tokens per step over tokens per second.
        """
        assert self.config.run_info is not None
        tokens_per_step = self.config.run_info.global_batch_size * self.config.run_info.seq_len
        seconds = time.perf_counter() - self.time_last_log
        tokens_per_second = self.ntokens_since_last_log / (
            seconds * self.parallel_dims.non_data_parallel_size
        )
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "step_seconds": tokens_per_step / (tokens_per_second * self.parallel_dims.world_size),
        }

    def _record_routing(self, step: int, routers: list[LoadBalancedRouter]) -> None:
        assert self._routing is not None and self.config.cut is not None
        sequences = batch_cut.first_sequences(self.config.cut, self._groups)
        cut = self.config.cut
        slices = self._groups.token_slices(cut.seq_len, cut.context_parallel_load_balancer)
        for router in routers:
            record = router.record
            assert record is not None and record.expert_ids_MBLK is not None
            for first, ids_BLK in zip(sequences, record.expert_ids_MBLK.cpu().numpy(), strict=True):
                self._routing.write(
                    step=step,
                    layer=router.layer,
                    first_sequence=first,
                    token_slices=slices,
                    expert_ids_BLK=ids_BLK,
                )


def adapt(config: Trainer.Config) -> None:
    """Replace torchtitan's metrics processor in a balanced job; keep a user's own."""
    if type(config.metrics) is MetricsProcessor.Config:
        config.metrics = derive(config.metrics, LoadBalanceMetricsProcessor.Config)
