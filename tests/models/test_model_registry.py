"""The DeepSeek-V3 entry: checkpoints, multi-token prediction. For all models: test_model_packages.py."""

from __future__ import annotations

import torch

from tests.support.train_jobs import train
from titan_moe_lb.balancing.losses import GlobalBatchAuxLoss, SequenceWiseAuxLoss
from titan_moe_lb.job import job_config


def test_hugging_face_checkpoint_goes_out_and_back(tmp_path):
    """Parameter names do not change, and the state of a loss stays out of it."""
    flags = ["--config", "deepseek_v3_tiny", "--model.aux_losses"]
    config = job_config.load([*flags, '[{type = "global_batch", weight = 1.0}]']).config
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    model = spec.model.build()
    model.init_states()
    state = model.state_dict()
    extra = {name for name in state if ".router.aux_losses." in name}
    assert {name.rsplit(".", 2)[1:][1] for name in extra} == {"load_E"} and len(extra) == 3
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
