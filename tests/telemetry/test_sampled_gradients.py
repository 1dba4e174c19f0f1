"""Gradients at the routers in every n-th logged step, and frozen parts in the trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.freeze_jobs import train_with_trace
from tests.support.own_loop_jobs import Layer, forward, plain_model
from tests.support.routers import inputs, router, sequence_wise
from titan_moe_lb.balancing.recording.training_loop import TrainingLoop
from titan_moe_lb.balancing.router import routers_of
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.own_loop.attach import attach
from titan_moe_lb.traces.trace import read_trace

JOB = [
    "--config=deepseek_v3_tiny",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--training.steps=6",
    "--metrics.log_freq=2",
    "--debug.seed=0",
    '--model.aux_losses=[{type="sequence_wise", weight=0.1}, {type="z_loss", weight=0.01}]',
    "--model.freeze={gate=1, bias=2}",
    "--metrics.router_gradients",
]
NAMES = ("main_gradient_squared", "aux_gradient_squared")
LAYOUTS = {
    "PP": ["--parallelism.pipeline_parallel_degree=2"],
    "FSDP": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_second_logged_step_is_that_of_every_one(ranks, tmp_path, layout):
    """Logged are steps 1, 2, 4 and 6; measured the first and 4."""
    traces = []
    for every in (1, 2):
        flags = [f"--metrics.router_gradients_every={every}", f"--dump_folder={tmp_path}/{every}"]
        gates = ranks.run(2, train_with_trace, [*JOB, *LAYOUTS[layout], *flags])
        traces.append(read_trace(tmp_path / str(every)))
    whole, sampled = traces
    assert sampled.steps.tolist() == [1, 2, 4, 6]
    for name in NAMES:
        found, expected = sampled.layer_columns[name], whole.layer_columns[name]
        assert (expected > 0)[:, 1:].all() and not np.isnan(expected).any()
        assert np.isnan(found[[1, 3]]).all()
        np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-5)
    assert sampled.info.frozen == {"bias": [2], "gate": [1], "losses": [1]}
    squares = next(one[1] for one in gates if 1 in one)
    norms = sampled.layer_columns["frozen_gate_squared"]
    np.testing.assert_allclose(norms[:, 0], squares, rtol=1e-12)
    assert np.isnan(norms[:, 1:]).all()


def test_a_step_that_is_left_out_has_the_operators_of_a_router_without():
    """The saved tensors and the gradient are those of a router that measures nothing."""
    results = []
    for every in (0, 1):
        built = router([sequence_wise()], loop=TrainingLoop(gradients_every=every))
        built.step_record.measures = False
        x, bias = inputs()
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=(saved := []): saved.append(t.shape) or t, lambda t: t
            ),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            built(x, bias)[0].square().sum().backward()
        operators = sorted(e.name for e in profile.events() if e.name.startswith("aten::"))
        results.append((saved, operators, built.gate.weight.grad))
        built.step_record.finish_step(1)
    (saved, operators, gradient), (saved_off, operators_off, gradient_off) = results
    assert saved == saved_off and operators == operators_off
    assert torch.equal(gradient, gradient_off)
    assert built.step_record.step_gradient_squares_N2.isnan().all()


def test_both_kinds_of_steps_compile_once():
    built = router([sequence_wise()], loop=TrainingLoop(gradients_every=2))
    graphs = []
    compiled = torch.compile(
        built, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward, fullgraph=True
    )
    x, bias = inputs()
    for measures in (True, False, True, False):
        built.step_record.measures = measures
        compiled(x, bias)
    assert len(graphs) == 2


def test_an_own_loop_measures_every_second_step():
    """Squared norms in the last layer: autograd without a loss, and what the losses add to it."""
    model, plain = plain_model(), plain_model()
    for router_without_loss in routers_of([plain]):
        router_without_loss.eval()
    balance = attach(model, rows_per_step=2, router_gradients_every=2)
    generator = torch.Generator().manual_seed(0)
    measured, expected = [], []
    for _step in range(3):
        plain.load_state_dict(model.state_dict())  # the biases
        tokens = torch.randint(0, 256, (2, 32), generator=generator)
        main, both = (_gradient_of_last_logits(one, tokens) for one in (plain, model))
        balance.close_step()
        columns = balance.load().layer_columns
        measured.append([columns[name][-1] for name in NAMES])
        expected.append([float(grad.double().square().sum()) for grad in (main, both - main)])
    assert np.min(expected) > 0
    np.testing.assert_allclose(measured[:2], expected[:2], rtol=1e-4)
    assert np.isnan(measured[2]).all()


def _gradient_of_last_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    gradients: list[torch.Tensor] = []

    def watch(_gate: torch.nn.Module, _args: tuple, logits: torch.Tensor) -> None:
        logits.register_hook(gradients.append)

    handle = routers_of([model])[-1].gate.register_forward_hook(watch)
    forward(model, tokens).float().logsumexp(-1).mean().backward()
    handle.remove()
    return gradients[0]


def test_an_own_loop_refuses_a_negative_number():
    with pytest.raises(JobError, match="router_gradients_every"):
        attach(Layer(), rows_per_step=2, router_gradients_every=-1)


@pytest.mark.parametrize("every", [0, -1])
def test_every_no_step_is_refused(every):
    with pytest.raises(JobError, match="metrics.router_gradients_every"):
        job_config.load([*JOB, f"--metrics.router_gradients_every={every}"])
