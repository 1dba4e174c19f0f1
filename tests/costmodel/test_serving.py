"""Tests of ``titan-moe-lb plan --serve``: by hand, by drawing experts, and against published
numbers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.support import planning
from tests.support.planning import TINY, device_file, write_run
from titan_moe_lb.commands.plan.known_hardware import hardware
from titan_moe_lb.costmodel.hardware.device import Hardware
from titan_moe_lb.costmodel.loads.expert_load import active_share
from titan_moe_lb.costmodel.times.dispatch import exchange_time
from titan_moe_lb.costmodel.times.gemm import gemm_time, turning_rows
from titan_moe_lb.costmodel.times.layer import measured_layer_time, served_layer_time
from titan_moe_lb.costmodel.times.moe_layer import MoELayer, RankRole
from titan_moe_lb.costmodel.times.served_load import ServedLoad, two_level_loads
from titan_moe_lb.costmodel.times.served_model import KVCache, ServedLayer, ServedModel
from titan_moe_lb.costmodel.times.serving import serve_degree

# 1 FLOP and 1 byte take 1 s: with so few rows memory is always the limit of a product.
UNIT = Hardware(
    name="unit",
    bf16_flops=1.0,
    memory_bytes=1e5,
    memory_bandwidth=1.0,
    scale_up_domain=8,
    scale_up_bandwidth=1.0,
    scale_up_latency=1e-3,
    scale_out_bandwidth=1.0,
    scale_out_latency=1e-3,
)
FAST = dataclasses.replace(
    UNIT,
    name="memory alone",
    bf16_flops=1e30,
    scale_up_bandwidth=1e30,
    scale_up_latency=1e-30,
    scale_out_bandwidth=1e30,
    scale_out_latency=1e-30,
)
MOE = MoELayer(num_experts=4, top_k=1, dim=2, hidden_dim=3)
MODEL = ServedModel(
    model_name="hand",
    flavor="tiny",
    moe_layers={1: MOE},
    layers=(
        ServedLayer(
            linears=((2, 5),),
            cache=KVCache(bytes_per_token=8, decode_flops=16, prefill_flops=16),
        ),
        ServedLayer(
            linears=(),
            cache=KVCache(bytes_per_token=8, decode_flops=16, prefill_flops=16, window=10),
        ),
    ),
    head=(2, 7),
    shared_bytes=100,
    expert_bytes={1: 36},
)


def served(device: Hardware, load: ServedLoad, tokens: int, ep_degree: int = 2, **changes):
    arguments = {"context": 40, "usable_bytes": 5000.0, "dispatcher": "standard", **changes}
    degree = serve_degree(
        MODEL, device, ep_degree=ep_degree, loads=[load], tokens=[tokens], **arguments
    )
    return degree, degree.rows[0]


def balanced() -> ServedLoad:
    return two_level_loads([MOE], [1.0], 1)[0]


def test_a_step_by_hand():
    """Each of 2 devices has 3 tokens and 2 of 4 experts: 6 tokens, one expert each."""
    degree, row = served(FAST, balanced(), 3)
    active = 1 - (3 / 4) ** 6
    rows = 6 / 4 / active
    # w1 and w3: rows x 2, 2 x 3, rows x 3 values of two bytes; w2 the same the other way round.
    expert = 3 * 2 * (rows * 2 + 6 + rows * 3)
    # The router: 3 x 2, 2 x 4, 3 x 4. Moved: 4 D + 3 F of each token received, 5 D of each sent.
    experts = 2 * active * expert + 2 * (6 + 8 + 12) + 2 * (3 * (8 + 9) + 3 * 10)
    assert row.active_experts == pytest.approx(2 * active)
    assert row.experts_seconds == pytest.approx(experts)
    assert row.exchange_seconds == pytest.approx(0, abs=1e-9)
    # 8 bytes of each of 40 tokens in one layer, of a window of 10 in the other.
    assert row.decode.cache_seconds == pytest.approx(3 * 8 * (40 + 10))
    # A prompt of 40 tokens, read once.
    assert row.prefill.cache_seconds == pytest.approx(8 * (40 + 10))
    linear = 2 * (3 * 2 + 10 + 3 * 5) + 2 * 2 * 3 * 7
    assert row.decode.linear_seconds == pytest.approx(linear + 2 * (3 * 2 + 14 + 3 * 7))
    assert row.prefill.linear_seconds == pytest.approx(linear + 2 * (1 * 2 + 14 + 1 * 7))
    for step in (row.decode, row.prefill):
        seconds = row.experts_seconds + step.cache_seconds + step.linear_seconds
        assert step.step_seconds == pytest.approx(seconds)
        assert step.tokens_per_second == pytest.approx(3 / seconds)
    # All but the routed experts, two of them, and 8 x 50 bytes of each sequence.
    assert degree.weight_bytes == 100 + 2 * 36
    assert row.decode.memory_bytes == 172 + 3 * 400
    assert row.prefill.memory_bytes == 172 + 400
    assert degree.most_sequences == (5000 - 172) // 400


def test_arithmetic_and_exchange_by_hand():
    _degree, row = served(UNIT, balanced(), 3)
    # 16 FLOPs of each token that is attended to; in a prefill half of the 40 before it, and of a
    # window of 10 in a context of 40: 10 - 10 x 10 / (2 x 40).
    assert row.decode.cache_seconds == pytest.approx(3 * 16 * (40 + 10))
    assert row.prefill.cache_seconds == pytest.approx(3 * 16 * (20 + 8.75))
    # Half of 3 tokens go to the other device, 2 values of 2 bytes each, there and back.
    assert row.exchange_seconds == pytest.approx(2 * 3 * (1 / 2) * 2 * 2)


def test_what_fits_is_what_is_usable():
    needs = served(FAST, balanced(), 3)[1].decode.memory_bytes
    assert served(FAST, balanced(), 3, usable_bytes=needs)[1].decode.fits
    degree, row = served(FAST, balanced(), 3, usable_bytes=needs - 1)
    assert (row.decode.fits, row.prefill.fits, degree.most_sequences) == (False, True, 2)
    assert served(FAST, balanced(), 1, usable_bytes=1)[0].most_sequences == 0


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 4), (7, 16, 4), (40, 64, 6)])
def test_active_experts_are_those_of_drawn_tokens(tokens, experts, top_k):
    random = np.random.default_rng(0)
    draws = 2000
    chosen = random.random((draws, tokens, experts)).argsort(axis=-1)[..., :top_k]
    found = np.mean([len(np.unique(drawn)) for drawn in chosen])
    assert experts * active_share(top_k / experts, tokens) == pytest.approx(found, rel=0.01)


def test_an_expert_that_every_token_chooses_is_active():
    assert active_share(np.array([0.0, 1.0, 1.0 + 1e-12]), 3).tolist() == [0, 1, 1]


def test_one_token_has_no_skew_at_balance():
    """With any number of tokens, the busiest device has the mean."""
    one = MoELayer(num_experts=64, top_k=2, dim=8, hidden_dim=8)
    placement = RankRole(tokens_per_rank=1, ep_degree=16)
    time, _active = served_layer_time(one, placement, UNIT, np.full((16, 4), 2 / 64))
    even = 1 * 2 * (15 / 16) * 8 * 2
    # 8 of 15 peers are further away, at the same bandwidth.
    assert time.dispatch == pytest.approx(even * 8 / 15)


def test_of_many_tokens_it_is_the_layer_of_a_training():
    """If every expert has tokens, a serving layer equals a training layer, also under uneven
    loads."""
    tokens_dn = np.array([[50, 30, 10, 6], [1000, 200, 100, 652]]) * 8.0
    placement = RankRole(tokens_per_rank=int(tokens_dn.sum()) // 2 // 2, ep_degree=2)
    layer = MoELayer(num_experts=8, top_k=2, dim=64, hidden_dim=32, shared_hidden_dim=32)
    served, _active = served_layer_time(layer, placement, UNIT, tokens_dn / placement.tokens)
    trained = measured_layer_time(layer, placement, UNIT, tokens_dn)
    assert served.forward == pytest.approx(trained.forward, rel=1e-9)


def test_copies_of_a_hot_expert_share_its_tokens():
    """All tokens choose expert 0 of 4: one device of two gets all of them, or two copies on three
    devices do."""
    hot = {"description": "one hot expert", "counts_NME": np.array([[[6.0, 0, 0, 0]]])}
    _degree, alone = served(UNIT, ServedLoad(name="contiguous", **hot), 3)
    _degree, copied = served(
        UNIT, ServedLoad(name="eplb +2", placement="eplb", redundant_experts=2, **hot), 3
    )
    assert alone.exchange_seconds == pytest.approx(3 / 2 * copied.exchange_seconds)
    assert alone.experts_seconds > copied.experts_seconds
    assert copied.decode.memory_bytes - alone.decode.memory_bytes == 36


def test_rows_where_arithmetic_takes_over():
    device = hardware("h100")
    rows = turning_rows(2048, 768, device)
    for more, limited in ((1.001, True), (0.999, False)):
        arithmetic = 2 * more * rows * 2048 * 768 / device.bf16_flops
        time = gemm_time(more * rows, 2048, 768, device)
        assert (time == pytest.approx(arithmetic, rel=1e-9)) == limited
    assert turning_rows(64, 32, device) is None
    # Qwen3 30B-A3B on 8 devices: 16 tokens of a device for each row of an expert's.
    small = MoELayer(num_experts=4, top_k=1, dim=2048, hidden_dim=768)
    model = ServedModel(**{**vars(MODEL), "moe_layers": {1: small}})
    degree = serve_degree(
        model,
        device,
        ep_degree=2,
        loads=[balanced()],
        tokens=[1],
        context=8,
        usable_bytes=1e9,
        dispatcher="standard",
    )
    assert degree.turning_tokens == pytest.approx(rows * 4 / 2)


@pytest.mark.parametrize(
    ("ep_degree", "microseconds"), [(16, 195), (32, 273), (64, 314), (128, 369), (256, 360)]
)
def test_combine_beside_the_published_latencies_of_deepep(ep_degree, microseconds):
    """DeepEP's docs/legacy.md reports 128 tokens of 7,168 in BF16, top 8, on H800 with
    InfiniBand."""
    device = hardware("h800").derated(compute_efficiency=0.5, network_efficiency=0.8)
    layer = MoELayer(num_experts=256, top_k=8, dim=7168, hidden_dim=1)
    role = RankRole(tokens_per_rank=128, ep_degree=ep_degree, dispatcher="low_latency")
    seconds = exchange_time(layer, role, device, skew=1.0)
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.1)


def test_low_latency_starts_all_messages_at_once():
    layer = MoELayer(num_experts=16, top_k=1, dim=1, hidden_dim=1)
    device = Hardware(**{**vars(UNIT), "scale_up_bandwidth": 1e9, "scale_out_bandwidth": 1e9})
    for kernel, starts in (("standard", 15), ("low_latency", 1)):
        role = RankRole(tokens_per_rank=1, ep_degree=16, dispatcher=kernel)
        seconds = exchange_time(layer, role, device, skew=1.0)
        assert seconds == pytest.approx(starts * 1e-3)


@pytest.mark.parametrize(
    ("model", "cache_bytes", "parameters"),
    [
        # 27 layers of 512 latents and 64 rotated values: 61 make the 70.272 KB of DeepSeek-V3 in
        # arXiv 2505.09343, table 1. Model cards: 15.7B and 30.5B parameters.
        ("deepseek_v3_16b", 70_272 * 27 / 61, 15.7e9),
        # 48 layers of 4 heads of 128, keys and values.
        ("qwen3_30b_a3b", 48 * 2 * 4 * 128 * 2, 30.5e9),
    ],
)
def test_caches_and_weights_of_published_models(ranks, model, cache_bytes, parameters):
    caches, weights = ranks.run(1, planning.served_sizes, model)[0]
    assert caches == cache_bytes
    assert weights == pytest.approx(2 * parameters, rel=0.005)


def test_windows_bound_the_cache(ranks):
    """In GPT-OSS, every other one of 24 layers sees 128 tokens; it has 8 heads of 64."""
    (sizes,) = ranks.run(1, planning.served_sizes, "gpt_oss_20b", 1024)
    assert sizes[0] * 1024 == 2 * 2 * 8 * 64 * 12 * (1024 + 128)


def test_further_predicted_tokens_are_not_served(ranks):
    plain, further = (
        ranks.run(1, planning.served_sizes, "deepseek_v3_tiny", 8, more)[0]
        for more in ([], ["--model.num_mtp_layers=1"])
    )
    assert plain == further


def test_answers_of_the_command(ranks, tmp_path):
    """The run has two hot neighbouring experts; the tiny model has 8 experts, top 2."""
    write_run(tmp_path, np.tile(np.array([5, 5, 1, 1, 1, 1, 1, 1]) * 64, (4, 3, 1)))
    arguments = [
        "plan",
        "--serve",
        "--hardware",
        device_file(tmp_path),
        "--ep=1,2",
        "--tokens=4,64",
    ]
    arguments += ["--context=16", "--from-run", str(tmp_path), "--redundant-experts=2"]
    page = tmp_path / "page.html"
    status, out, err = ranks.run(
        1, planning.command, [*arguments, "--json", "-o", str(page), "--", *TINY]
    )[0]
    assert status == 0, err
    found = json.loads(out)
    assert found["verdict"]["load"] == "contiguous"
    by_load = {
        (degree["ep_degree"], row["load"], row["tokens"]): row
        for degree in found["degrees"]
        for row in degree["rows"]
    }
    loads = ("1.00", "contiguous", "greedy", "eplb +2")
    assert set(by_load) == {(ep, load, n) for ep in (1, 2) for load in loads for n in (4, 64)}
    balance, blocks, greedy, _copies = (by_load[2, load, 64]["exchange_seconds"] for load in loads)
    # 12 of 16 parts of the load are on one device of two.
    assert blocks == pytest.approx(balance * 1.5)
    assert greedy == pytest.approx(balance)
    best = found["verdict"]["most_decoded"]
    rows = [row for (_ep, load, _n), row in by_load.items() if load == "contiguous"]
    assert best["row"] == max(rows, key=lambda row: row["decode"]["tokens_per_second"])
    text = page.read_text()
    assert text.count("<tr") == 1 + len(by_load) and "Plan of a deployment" in text
    status, out, err = ranks.run(1, planning.command, [*arguments, "--", *TINY])[0]
    assert status == 0, err
    assert out.startswith("Verdict: under the load of the run's last steps, EP ")
    assert "EP 2: weights of " in out and "eplb +2" in out


def test_nothing_fits(ranks, tmp_path):
    arguments = ["plan", "--serve", "--hardware", device_file(tmp_path), "--ep=1"]
    arguments += ["--tokens=1000000"]
    status, out, err = ranks.run(1, planning.command, [*arguments, "--", *TINY])[0]
    assert status == 0, err
    assert out.startswith("Verdict: under balance nothing fits in 0.1 GiB")


@pytest.mark.parametrize(
    ("imbalance", "load"),
    [
        ("1.0", "balance"),
        ("1.5,1.0", "an imbalance of 1.50"),
        ("1.0,lognormal:0.5", "log-normal loads of sigma 0.5"),
        ("overload:1.3@2", "log-normal loads with an overload of 1.30 at EP 2"),
    ],
)
def test_the_load_of_the_verdict(ranks, tmp_path, imbalance, load):
    arguments = ["plan", "--serve", "--hardware", device_file(tmp_path), "--ep=1", "--tokens=4"]
    arguments += ["--context=16", f"--imbalance={imbalance}"]
    status, out, err = ranks.run(1, planning.command, [*arguments, "--", *TINY])[0]
    assert status == 0, err
    assert out.startswith(f"Verdict: under {load}")
