"""Tests against transformers: same logits from the same checkpoint, and the same bits back."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchtitan.models import gpt_oss as torchtitan_gpt_oss

from model_registry import gpt_oss
from tests.support.hugging_face import logits_and_export
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.rules.hugging_face import initial_weights_fit

TOLERANCE = 1e-4
# Longer than the sliding window of GPT-OSS.
SEQUENCE_LENGTH = 256
SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "attn_implementation": "eager",
}


def deepseek_v3() -> transformers.PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        intermediate_size=128,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        # transformers fixes this one at 1e-6; all norms of torchtitan's model have 1e-5.
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    return model


def qwen3() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=32,
        num_experts=8,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss_() -> transformers.PreTrainedModel:
    config = transformers.GptOssConfig(
        **SIZES, intermediate_size=48, num_local_experts=8, sliding_window=128
    )
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize(
    ("module", "make"),
    [("deepseek_v3", deepseek_v3), ("qwen3", qwen3), ("gpt_oss", gpt_oss_)],
    ids=["DeepSeek-V3", "Qwen3", "GPT-OSS"],
)
def test_logits_and_checkpoint_of_transformers(ranks, tmp_path, module, make):
    torch.manual_seed(0)
    reference = make().float().eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1.0)
    reference.save_pretrained(tmp_path / "hugging_face")
    tokens = torch.randint(SIZES["vocab_size"], (2, SEQUENCE_LENGTH))
    with torch.no_grad():
        expected = reference(tokens).logits
    # The state of a loss stays out of the checkpoint.
    loss = '--model.aux_losses=[{type = "global_batch", weight = 1.0}]'
    arguments = ["--module", module, "--config", f"{module}_tiny", loss]
    ((training, evaluation, folder),) = ranks.run(
        1,
        logits_and_export,
        arguments,
        str(tmp_path / "hugging_face"),
        str(tmp_path / "out"),
        tokens,
    )
    assert expected.abs().max() > 1.0
    assert (training - expected).abs().max() <= TOLERANCE
    assert torch.equal(evaluation, training)

    first = load_file(tmp_path / "hugging_face" / "model.safetensors")
    (written,) = list((tmp_path / "out").rglob("model*.safetensors"))
    back = load_file(written)
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_torchtitans_own_gpt_oss_adapter_loses_the_experts():
    """This is the reason for our own adapter. If it fails, remove the adapter."""
    spec = torchtitan_gpt_oss.model_registry("debugmodel")
    with torch.device("meta"):
        state = spec.model.build().state_dict()
    experts = {name for name in state if ".inner_experts." in name}
    assert len(experts) == 4 * 4
    upstream = spec.state_dict_adapter(spec.model, None)
    own = gpt_oss.GptOssStateDictAdapter(spec.model, None)
    assert not [name for name in upstream.to_hf(state) if ".experts." in name]
    assert len([name for name in own.to_hf(state) if ".experts." in name]) == len(experts)
    assert experts <= own.from_hf(own.to_hf(state)).keys()


def test_folder_with_a_bias_that_the_job_would_drop_is_one_line(tmp_path):
    deepseek_v3().save_pretrained(tmp_path)
    job = [
        *("--config", "deepseek_v3_tiny", f"--dump_folder={tmp_path}/out"),
        *("--checkpoint.enable", "--checkpoint.initial_load_in_hf"),
        f"--checkpoint.initial_load_path={tmp_path}",
    ]
    for rule in ("sign", "frozen"):
        initial_weights_fit(job_config.load([*job, f"--model.expert_bias={rule}"]))
    with pytest.raises(JobError) as error:
        initial_weights_fit(job_config.load([*job, "--model.expert_bias=none"]))
    assert "an expert bias ('model.layers.1.mlp.gate.e_score_correction_bias')" in str(error.value)
    assert 'keep it with expert_bias = {type = "frozen"}' in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "has no tensor 'model.norm.weight'"),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2048, 32)}),
            "'lm_head.weight' has shape (2048, 32) in",
        ),
        (
            lambda tensors: tensors.update(
                {"lm_head.weight_blocks": tensors.pop("lm_head.weight")}
            ),
            "holds 'lm_head.weight' in quantized blocks; write the checkpoint out in bfloat16",
        ),
        (lambda tensors: tensors.clear(), "no *.safetensors file"),
    ],
    ids=["missing", "shape", "quantized", "none"],
)
def test_folder_of_another_model_is_one_line(tmp_path, change, expected):
    arguments = ["--module", "qwen3", "--config", "qwen3_tiny", f"--dump_folder={tmp_path}/out"]
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"]
    job = job_config.load([*arguments, *flags, f"--checkpoint.initial_load_path={tmp_path}"])
    qwen3().save_pretrained(tmp_path)
    initial_weights_fit(job)  # as it was written
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    (tmp_path / "model.safetensors").unlink()
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(JobError) as error:
        initial_weights_fit(job)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
