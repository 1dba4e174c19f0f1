"""The DeepSeek-V3 entry: defaults, flavors, checkpoints, multi-token prediction."""

from __future__ import annotations

import pytest
import torch
from torchtitan.models.common.moe import MoE

from model_registry.deepseek_v3 import FLAVORS, model_registry
from tests.train_jobs import train
from titan_moe_lb import job_config
from titan_moe_lb.errors import JobError
from titan_moe_lb.losses import GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.router import LoadBalancedRouter


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_moe_layer_has_the_defaults_of_the_report(flavor):
    layers = list(model_registry(flavor).model.traverse(MoE.Config))
    assert layers
    for _fqn, moe, _parent, _attribute in layers:
        assert moe.load_balance_coeff == 1e-3
        assert isinstance(moe.router, LoadBalancedRouter.Config)
        (loss,) = moe.router.aux_losses
        assert isinstance(loss, SequenceWiseAuxLoss.Config)
        assert (loss.weight, loss.count_from) == (1e-4, "scores")


def test_unknown_flavor_names_the_nearest():
    with pytest.raises(JobError, match="did you mean '671B'"):
        model_registry("67B")


def test_hugging_face_checkpoint_goes_out_and_back(monkeypatch, tmp_path):
    """Parameter names do not change, and the state of a loss stays out of it."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = ["--config", "deepseek_v3_tiny", "--model.aux_losses"]
    config = job_config.load([*flags, '[{type = "global_batch", weight = 1.0}]']).config
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    model = spec.model.build()
    model.init_states()
    state = model.state_dict()
    extra = {name for name in state if ".router.aux_losses." in name}
    assert {name.rsplit(".", 2)[1:][1] for name in extra} == {"counts_E"} and len(extra) == 3
    adapter = spec.state_dict_adapter(spec.model, str(tmp_path))
    hugging_face = adapter.to_hf(state)
    assert "model.layers.1.mlp.gate.weight" in hugging_face
    back = adapter.from_hf(hugging_face)
    assert back.keys() == state.keys() - extra
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_multi_token_prediction_layers_are_balanced_too(ranks):
    losses = [GlobalBatchAuxLoss.type_name, SequenceWiseAuxLoss.type_name]
    tables = ", ".join(f'{{type = "{name}", weight = 1e-3}}' for name in losses)
    arguments = ["--config", "deepseek_v3_tiny", "--training.steps=2"]
    model = ["--model.num_mtp_layers=1", f"--model.aux_losses=[{tables}]"]
    ((_first, second),) = ranks.run(1, train, [*arguments, *model])
    assert second["moe/global_load_balancing_loss"] >= 1.0
    assert second["moe/max_violation"] > 0
