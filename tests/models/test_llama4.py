"""Tests of Llama 4 against Hugging Face: logits, checkpoints, expert input, packing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.attention.flex_attention import create_mask
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.models.common.config_utils import get_attention_config
from transformers import Llama4ForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

from model_registry.llama4.architecture import Architecture
from model_registry.llama4.flavors import ARCHITECTURES
from model_registry.llama4.model import Llama4Model
from model_registry.llama4.state_dict_adapter import Llama4StateDictAdapter
from tests.support.hugging_face import weights_and_export
from titan_moe_lb.data import TOKENIZER_PATH
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.rules.hugging_face import initial_weights_fit

SEQUENCE_LENGTH = 256
INDEX = "model.safetensors.index.json"
FILE = "model-00001-of-00001.safetensors"
TINY = ARCHITECTURES["tiny"]
VARIANTS = {
    "tiny": TINY,
    "like Scout": dataclasses.replace(
        TINY,
        rope_scaling_factor=16.0,
        original_max_position_embeddings=128,
    ),
    "like Maverick": dataclasses.replace(TINY, interleave_moe_layer_step=2, use_qk_norm=False),
}


def hugging_face(architecture: Architecture) -> Llama4ForCausalLM:
    """Build Hugging Face's model of the same architecture, with random weights that use every
    part."""
    rope: dict = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": architecture.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": architecture.original_max_position_embeddings,
        }
    config = Llama4TextConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.dim,
        intermediate_size=architecture.moe_hidden_dim,
        intermediate_size_mlp=architecture.dense_hidden_dim,
        num_hidden_layers=architecture.n_layers,
        num_attention_heads=architecture.n_heads,
        num_key_value_heads=architecture.n_kv_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_seq_len,
        num_local_experts=architecture.num_experts,
        interleave_moe_layer_step=architecture.interleave_moe_layer_step,
        use_qk_norm=architecture.use_qk_norm,
        no_rope_layer_interval=architecture.no_rope_layer_interval,
        attention_chunk_size=architecture.chunk_size,
        floor_scale=architecture.floor_scale,
        attn_scale=architecture.attn_scale,
        rope_parameters=rope,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


def ours(architecture: Architecture) -> Llama4Model:
    """Build our model with dense attention, as on the host, and experts in float32."""
    config = architecture.config(attn_backend="flex", moe_comm_backend="standard")
    overrides = [
        "tests.parity.float32_experts.float32_experts",
        "titan_moe_lb.upstream.cpu.attention.dense_mask_attention",
    ]
    apply_overrides(OverrideConfig(imports=overrides), config)
    return config.build()


def loaded(architecture: Architecture) -> tuple[Llama4Model, Llama4ForCausalLM]:
    """Both models with the weights of Hugging Face's."""
    theirs, model = hugging_face(architecture), ours(architecture)
    adapter = Llama4StateDictAdapter(model.config, None)
    missing, unexpected = model.load_state_dict(adapter.from_hf(theirs.state_dict()), strict=False)
    assert not unexpected and all(name.endswith("expert_bias_E") for name in missing)
    return model.eval(), theirs


def logits(model: Llama4Model, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, positions, model.get_attention_masks(positions))


def tokens_and_positions(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, TINY.vocab_size, (batch, SEQUENCE_LENGTH), generator=generator)
    return tokens, torch.arange(SEQUENCE_LENGTH).expand(batch, -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_hugging_face(variant):
    model, theirs = loaded(VARIANTS[variant])
    tokens, positions = tokens_and_positions()
    with torch.no_grad():
        expected = theirs(tokens).logits
    error = (logits(model, tokens, positions) - expected).abs().max()
    assert error < 1e-4
    assert expected.std() > 0.1, "logits too small for 1e-4 to say anything"


def test_every_part_shows_in_the_logits():
    """No comparison above could pass if a part were missing."""
    model, _theirs = loaded(TINY)
    tokens, positions = tokens_and_positions()
    reference = logits(model, tokens, positions)
    for change in (
        {"chunk_size": 8192},
        {"floor_scale": 8192},
        {"use_qk_norm": False},
        {"no_rope_layer_interval": 5},
        {"rope_scaling_factor": 16.0, "original_max_position_embeddings": 128},
    ):
        other = ours(dataclasses.replace(TINY, **change)).eval()
        other.load_state_dict(model.state_dict())
        assert (logits(other, tokens, positions) - reference).abs().max() > 0.1, change


def test_what_a_document_is_packed_with_does_not_change_it():
    """Chunks, RoPE and temperature count from the document's start; 150 is not a multiple of a
    chunk."""
    model, _theirs = loaded(TINY)
    tokens, positions = tokens_and_positions(batch=1)
    first = 150
    packed = torch.cat([positions[:, :first], positions[:, : SEQUENCE_LENGTH - first]], dim=1)
    together = logits(model, tokens, packed)
    for part in (slice(0, first), slice(first, None)):
        alone = logits(model, tokens[:, part], packed[:, part])
        torch.testing.assert_close(together[:, part], alone, atol=1e-4, rtol=0)
    assert (together - logits(model, tokens, positions)).abs().max() > 0.1


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoint_goes_out_and_back_bit_for_bit(variant, prefix, tmp_path):
    """The checkpoint has the names of the text model alone, or of the published checkpoints."""
    theirs = {prefix + name: w for name, w in hugging_face(VARIANTS[variant]).state_dict().items()}
    vision = {"vision_model.class_embedding": torch.zeros(3)} if prefix else {}
    index = {"weight_map": dict.fromkeys([*theirs, *vision], FILE)}
    (tmp_path / INDEX).write_text(json.dumps(index))
    model = ours(VARIANTS[variant])
    adapter = Llama4StateDictAdapter(model.config, str(tmp_path))
    state = adapter.from_hf({**theirs, **vision})
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("expert_bias_E")}
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in weights.items()}
    model.load_state_dict(state, strict=False)
    back = adapter.to_hf(model.state_dict())
    assert back.keys() == theirs.keys() == adapter.fqn_to_index_mapping.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ({"data_parallel_shard_degree": 4, "expert_parallel_degree": 2}, "language_model."),
        ({"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}, ""),
        ({"data_parallel_shard_degree": 2, "pipeline_parallel_degree": 2}, ""),
    ],
    ids=["fsdp4_ep2", "fsdp2_tp2", "fsdp2_pp2"],
)
def test_job_starts_from_a_checkpoint_and_writes_one(ranks, tmp_path, monkeypatch, layout, prefix):
    """Experts are sharded twice over experts, over their hidden dimension, or over stages: the bits
    agree."""
    theirs = {prefix + name: w for name, w in hugging_face(TINY).state_dict().items()}
    folder, out = tmp_path / "hugging_face", tmp_path / "out"
    shutil.copytree(TOKENIZER_PATH, folder)
    save_file(theirs, folder / FILE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(theirs, FILE)}))
    arguments = [
        *("--module", "llama4", "--config", "llama4_tiny", f"--hf_assets_path={folder}"),
        *("--model.aux_losses", '[{type = "sequence_wise", weight = 1e-3}]'),
        *(f"--parallelism.{name}={degree}" for name, degree in layout.items()),
    ]
    loading = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"]
    initial_weights_fit(job_config.load([*arguments, *loading], 4))
    by_rank = ranks.run(4, weights_and_export, arguments, str(folder), str(out))
    expected = Llama4StateDictAdapter(ours(TINY).config, None).from_hf(theirs)
    weights = {
        k: v for held, _folder in by_rank for k, v in held.items() if "expert_bias_E" not in k
    }
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    back = load_file(Path(by_rank[0][1]) / FILE)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("expert_shard", [0, 1])
def test_experts_sharded_along_their_hidden_dimension(ranks, expert_shard):
    """FSDP shards them so if there are more ranks than experts, with EP and with TP."""
    assert all(ranks.run(4, hidden_dimension_survives, expert_shard))


def hidden_dimension_survives(expert_shard: int) -> bool:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "tp"))
    generator = torch.Generator().manual_seed(3)
    shapes = {"w1_EFD": (8, 6, 10), "w2_EDF": (8, 10, 6), "w3_EFD": (8, 6, 10)}
    whole = {
        f"layers.1.moe.routed_experts.inner_experts.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    sharded = {}
    for name, value in whole.items():
        hidden = 2 if name.endswith("w2_EDF") else 1
        placements = [Shard(1), Shard(0)] if expert_shard else [Shard(0), Shard(hidden)]
        sharded[name] = distribute_tensor(value, mesh, placements)
    adapter = Llama4StateDictAdapter(ours(TINY).config, None)
    expected, hf = adapter.to_hf(whole), adapter.to_hf(sharded)
    # A quarter of each tensor on each rank: nothing was gathered.
    assert all(4 * value.to_local().numel() == value.numel() for value in hf.values())
    back = adapter.from_hf(hf)
    same = [torch.equal(hf[name].full_tensor(), expected[name]) for name in expected]
    same += [torch.equal(back[name].full_tensor(), whole[name]) for name in whole]
    torch.distributed.destroy_process_group()
    return all(same)


def test_experts_weight_their_input():
    """The reference computes one expert after another in float64; s E(x) would be far off."""
    architecture = dataclasses.replace(TINY, dim=32)
    moe = ours(architecture).layers["0"].moe
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    x_BLD = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
    experts = moe.routed_experts.inner_experts
    w1_EFD, w2_EDF, w3_EFD = (w.double() for w in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD))
    x_TD = x_BLD.double().flatten(0, 1)
    score_T, expert_T = torch.sigmoid(x_TD @ moe.router.gate.weight.double().T).max(dim=-1)

    def swiglu(x_D, w1_FD, w2_DF, w3_FD):
        return (F.silu(x_D @ w1_FD.T) * (x_D @ w3_FD.T)) @ w2_DF.T

    shared_TD = swiglu(
        x_TD, *(getattr(moe.shared_experts, name).weight.double() for name in ("w1", "w2", "w3"))
    )

    def routed(weigh_input: bool) -> torch.Tensor:
        rows = []
        for x_D, score, e in zip(x_TD, score_T, expert_T, strict=True):
            weights = w1_EFD[e], w2_EDF[e], w3_EFD[e]
            rows.append(
                swiglu(score * x_D, *weights) if weigh_input else score * swiglu(x_D, *weights)
            )
        return torch.stack(rows) + shared_TD

    out_TD = moe(x_BLD).double().flatten(0, 1)
    torch.testing.assert_close(out_TD, routed(True), atol=1e-5, rtol=1e-5)
    assert (out_TD - routed(False)).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["flex", "varlen"])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_of_packed_documents(backend, batch):
    """The reference is the rule: earlier tokens of the same document and, if chunked, of the
    chunk."""
    architecture = dataclasses.replace(TINY, n_layers=1)
    model = architecture.config(attn_backend="flex", moe_comm_backend="standard").build()
    model.config.layers[0].attention.inner_attention = get_attention_config(backend)
    lengths = [[150, 96, 10], [200, 56]][:batch]
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in documents]) for documents in lengths]
    )
    document = torch.stack(
        [
            torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
            for documents in lengths
        ]
    )
    masks = model.get_attention_masks(positions)
    index = torch.arange(positions.shape[1])
    full = (index[:, None] >= index) & (document[:, :, None] == document[:, None])
    chunk = positions // TINY.chunk_size
    expected = {"full": full, "chunked": full & (chunk[:, :, None] == chunk[:, None])}
    for name, mask in masks.items():
        seen = flex_mask(mask, *positions.shape) if backend == "flex" else varlen_mask(mask)
        assert torch.equal(seen, expected[name] if backend == "flex" else flat(expected[name]))


def flex_mask(mask, batch: int, length: int) -> torch.Tensor:
    return create_mask(mask.mask_mod, batch, 1, length, length, device="cpu")[:, 0]


def varlen_mask(mask) -> torch.Tensor:
    """Causal within each segment of the flattened batch."""
    index = torch.arange(mask.cu_seq_q[-1])
    segment = torch.bucketize(index, mask.cu_seq_q, right=True)
    assert torch.bincount(segment).max() == mask.max_q
    return (index[:, None] >= index) & (segment[:, None] == segment)


def flat(mask_BLL: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*mask_BLL.int()).bool()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.interleave_moe_layer_step=5"], "llama4 tiny takes 1 to 4, its number of layers"),
        (
            ["--model.attn_backend=varlen", "--parallelism.context_parallel_degree=2"],
            'attn_backend "varlen" cannot be split over context-parallel ranks',
        ),
        (["--parallelism.tensor_parallel_degree=4"], "must divide n_kv_heads (2)"),
    ],
    ids=["interleave", "varlen", "heads"],
)
def test_what_cannot_be_is_one_line(flags, expected):
    arguments = ["--module", "llama4", "--config", "llama4_tiny", "--training.seq_len=256"]
    with pytest.raises(JobError) as error:
        job_config.load([*arguments, *flags], 4)
    assert expected in str(error.value) and "\n" not in str(error.value)
