"""Tests of ``titan-moe-lb place`` on small files: names, groups, refusals, leftovers."""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.support.place_jobs import layer_state, save_in_a_grid, saved
from tests.support.synthetic_trace import run_info, write_run
from titan_moe_lb.checkpoints.placement_file import FILE_NAME, read
from titan_moe_lb.commands.place.by_expert import Stored, expert_tensors
from titan_moe_lb.commands.place.command import place
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.parallel.layer_numbers import layer_numbers
from titan_moe_lb.traces.expert_order import greedy, greedy_in_groups
from titan_moe_lb.traces.trace import read_trace

E = 8


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """Run of two MoE layers with a checkpoint, beside a run without groups."""
    folder = tmp_path_factory.mktemp("scene")
    groups = {"expert_groups": (), "num_layers": 2}
    write_run(folder / "run", run_info(**groups), 20)
    saved(folder / "run" / "checkpoint" / "step-7")
    write_run(folder / "old", run_info(2), 2)
    write_run(folder / "wide", run_info(2, 16, expert_groups=()), 2)
    write_run(folder / "deep", run_info(3, expert_groups=()), 2)
    write_run(folder / "forced", run_info(**groups, forced_routing="hot_rank (rank 0)"), 2)
    write_run(folder / "renumbered", run_info(**groups, placement="placed for EP 2 (abc)"), 2)
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    state = layer_state(1) | layer_state(2)
    state = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def placed_by_hand(state: dict[str, torch.Tensor], orders: dict[int, list[int]]) -> dict:
    """Reference placement, with names written out."""
    out = dict(state)
    for number, order in orders.items():
        layer = f"layers.{number}.moe"
        gate, bias = f"{layer}.router.gate.weight", f"{layer}.expert_bias_E"
        weight = f"{layer}.routed_experts.inner_experts.w1_EFD"
        moments = [f"optimizer.state.{name}.exp_avg" for name in (gate, weight)]
        for name in (gate, bias, weight, *moments):
            out[name] = state[name][order]
    return out


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_is_placed_by_its_own_loads(scene, tmp_path):
    said = place(scene / "run", output=tmp_path / "new", ep=4)
    counts_ME = read_trace(scene / "run").counts_SME[-2:].sum(axis=0)
    orders = {
        1: greedy(counts_ME[0], 4).ravel().tolist(),
        2: np.roll(greedy(counts_ME[1], 4), 1, axis=0).ravel().tolist(),
    }
    source, target = (
        folder / "checkpoint" / "step-7" for folder in (scene / "run", tmp_path / "new")
    )
    assert_same_state(state_of(target), placed_by_hand(state_of(source), orders))
    ranks_M4 = np.stack([counts_ME[row][orders[row + 1]].reshape(4, 2).sum(1) for row in (0, 1)])
    after_M = ranks_M4.max(axis=1) / ranks_M4.mean(axis=1)
    figures = f"as placed {after_M.mean():.3f} x (worst layer {after_M.max():.3f})"
    assert said[1].endswith(figures) and said[1].startswith("EP 4, steps 19 to 20 of")
    assert "with optimizer state" in said[0]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["checkpoint", FILE_NAME]
    place(tmp_path / "new", output=tmp_path / "back", undo=True)
    assert_same_state(state_of(tmp_path / "back" / "checkpoint" / "step-7"), state_of(source))
    # A later step of the run that goes on has the run's placement.
    (tmp_path / "new" / "checkpoint" / "step-7").rename(tmp_path / "new" / "checkpoint" / "step-9")
    place(tmp_path / "new", output=tmp_path / "later", undo=True)
    assert_same_state(state_of(tmp_path / "later" / "checkpoint" / "step-9"), state_of(source))


def test_placed_twice_and_taken_back_one_by_one(scene, tmp_path):
    first = scene / "run" / "checkpoint" / "step-7"
    place(first, output=tmp_path / "a.json", ep=2)
    place(first, output=tmp_path / "once", file=tmp_path / "a.json")
    place(tmp_path / "once", output=tmp_path / "twice", file=tmp_path / "a.json")
    orders = {number: order.tolist() for number, order in read(tmp_path / "a.json").orders.items()}
    once = placed_by_hand(state_of(first), orders)
    assert_same_state(state_of(tmp_path / "once"), once)
    assert_same_state(state_of(tmp_path / "twice"), placed_by_hand(once, orders))
    place(tmp_path / "twice", output=tmp_path / "one_back", undo=True)
    assert_same_state(state_of(tmp_path / "one_back"), once)
    place(tmp_path / "one_back", output=tmp_path / "both_back", undo=True)
    assert_same_state(state_of(tmp_path / "both_back"), state_of(first))
    with pytest.raises(JobError, match="they have other numbers"):
        place(tmp_path / "once", output=tmp_path / "x", ep=2, from_run=scene / "run")


def test_chunks_cut_along_two_axes(ranks, scene, tmp_path):
    whole = state_of(scene / "run" / "checkpoint" / "step-7")
    ranks.run(4, save_in_a_grid, str(tmp_path / "grid"), whole)
    place(tmp_path / "grid", output=tmp_path / "new", ep=2, from_run=scene / "run")
    orders = {n: order.tolist() for n, order in read(tmp_path / "new" / FILE_NAME).orders.items()}
    assert_same_state(state_of(tmp_path / "new"), placed_by_hand(whole, orders))


def test_weights_alone_have_no_moments(scene, tmp_path):
    moments = {name: None for name in state_of(scene / "run/checkpoint/step-7") if "optim" in name}
    saved(tmp_path / "weights", **moments)
    said = place(tmp_path / "weights", output=tmp_path / "new", ep=2, from_run=scene / "run")
    assert "without optimizer state" in said[0]


@pytest.mark.parametrize(
    ("groups", "ep"), [((4,), 2), ((2,), 4), ((2, 4), 2), ((2, 8), 4), ((), 4), ((4,), 4)]
)
def test_groups_stay_together_and_no_order_is_better(groups, ep):
    """The placement is compared with all orders that keep the groups.

    With two units on a device, pairing the largest with the smallest is optimal. With more units, a
    greedy placement may be beaten.
    """
    orders = np.array(list(itertools.permutations(range(E))))
    for number in groups:
        members = orders.reshape(len(orders), number, -1) // (E // number)
        orders = orders[(members == members[..., :1]).all(axis=(1, 2))]
    for seed in range(5):
        counts_E = np.random.default_rng(seed).integers(1, 1000, E)
        order = greedy_in_groups(counts_E, ep, groups, roll=seed).ravel()
        assert (orders == order).all(axis=1).any()
        busiest = counts_E[np.vstack([order, orders])].reshape(-1, ep, E // ep).sum(2).max(1)
        assert busiest[0] == busiest.min()


@pytest.mark.parametrize(("groups", "ep"), [((3,), 4), ((4, 6), 2)])
def test_where_no_whole_groups_can_move_none_does(groups, ep):
    counts_E = np.random.default_rng(0).integers(1, 1000, 12)
    assert greedy_in_groups(counts_E, ep, groups, roll=1).ravel().tolist() == list(range(12))


def test_numbers_of_layers_are_those_of_a_trace():
    for name in ("deepseek_v3_debugmodel_mtp", "deepseek_v3_tiny"):
        job = job_config.load(["--config", name])
        state = job.meta_model.state_dict()
        tensors = {key: Stored(tuple(value.shape), "") for key, value in state.items()}
        found = sorted(layer.layer for layer in expert_tensors(tensors))
        assert found == sorted(layer_numbers(job.config.model_spec.model).values())


NEW = "layers.1.moe"
REFUSED = {
    "router.lora_a.weight": (torch.zeros(E, 2), "per expert"),
    "router.seen_E": (torch.zeros(3), "has shape (3,), and the gate of its layer has 8 experts"),
    "routed_experts.inner_experts.w9_EFD": (torch.zeros(4, 8), "has shape (4, 8), and the gate"),
    "router._extra_state": ("text", "is of an MoE layer, and is no tensor"),
}


@pytest.mark.parametrize("tail", REFUSED)
def test_what_no_rule_knows_is_refused(tail, scene, tmp_path):
    value, expected = REFUSED[tail]
    refused(saved(tmp_path / "it", **{f"{NEW}.{tail}": value}), scene, tmp_path, expected, tail)


def test_state_of_other_shapes_and_experts_elsewhere_are_refused(scene, tmp_path):
    lost = {f"optimizer.state.{NEW}.router.gate.bias.exp_avg": torch.zeros(E)}
    refused(saved(tmp_path / "0", **lost), scene, tmp_path, "of a parameter that is not there")
    state = f"optimizer.state.{NEW}.router.gate.weight.row_E"
    refused(saved(tmp_path / "a", **{state: torch.zeros(E)}), scene, tmp_path, "cannot be split")
    elsewhere = {"layers.0.mlp_experts.up": torch.zeros(E, 2)}
    refused(saved(tmp_path / "b", **elsewhere), scene, tmp_path, "in no known MoE layer")
    tensors = {"layers.1.moe.router.gate.weight": Stored((4, 2), "F32")}
    tensors |= {f"layers.1.moe.experts.{n}.up.weight": Stored((2, 2), "F32") for n in range(3)}
    with pytest.raises(JobError, match="is there for 3 experts, and the gate has 4"):
        expert_tensors(tensors)
    tensors["layers.1.moe.experts.3.up.weight"] = Stored((2, 2), "F8")
    with pytest.raises(JobError, match="differs in shape or type between experts"):
        expert_tensors(tensors)


def refused(folder: Path, scene: Path, tmp_path: Path, *expected: str, **arguments) -> None:
    """Check that a command is refused in one line, and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    arguments = {"ep": 2, "from_run": scene / "run", **arguments}
    with pytest.raises(JobError) as error:
        place(folder, output=tmp_path / "new", **arguments)
    assert all(text in str(error.value) for text in expected), error.value
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def placement_file(file: Path, **changes) -> Path:
    table = {"ep_degree": 2, "groups": [], "orders": {n: list(range(E))[::-1] for n in (1, 2)}}
    file.write_text(json.dumps(table | changes))
    return file


BAD_PLACEMENTS = {
    "is a placement for EP 4": {"ep_degree": 4},
    "the placement is of MoE layers 1, and": {"orders": {1: list(range(E))}},
    "the placement has 4 experts in layer 1, and": {"orders": {1: [0, 1, 2, 3], 2: list(range(E))}},
    "is no order of its 8 experts": {"orders": {1: [0] * E, 2: list(range(E))}},
    "splits one of the 4 expert groups of layer 1": {
        "groups": [4],
        "orders": {n: [0, 2, 1, 3, 4, 5, 6, 7] for n in (1, 2)},
    },
    "is no placement: it needs ep_degree": {"orders": [1, 2]},
    "keeps 3 groups, which do not divide 8 experts": {"groups": [2, 3]},
}


@pytest.mark.parametrize("expected", BAD_PLACEMENTS)
def test_a_placement_that_does_not_fit(expected, scene, tmp_path):
    file = placement_file(tmp_path / "p.json", **BAD_PLACEMENTS[expected])
    step = scene / "run" / "checkpoint" / "step-7"
    refused(step, scene, tmp_path, expected, file=file, from_run=None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"ep": 3}, "expert-parallel degree 3 does not divide 8 experts"),
        ({"ep": 1}, "--ep is 1; it must be at least 2"),
        ({"ep": None}, "--ep is missing"),
        ({"groups": "4,x"}, "--groups 4,x must be whole numbers"),
        ({"groups": "3"}, "--groups 3 does not divide 8 experts"),
        ({"ep": 8}, "no order was found that loads the ranks more evenly"),
        ({"groups": "2"}, "no order of whole groups (2) was found"),
        ({"from_run": "wide"}, "the placement has 16 experts in layer 1, and"),
        ({"from_run": "deep"}, "the placement is of MoE layers 1 to 3 (3), and"),
        ({"from_run": "old"}, "--groups 1 for none"),
        ({"from_run": "forced"}, "was forced (hot_rank (rank 0))"),
        ({"from_run": "renumbered"}, "placed for EP 2 (abc), and those of"),
        ({"from_run": "nowhere"}, "there is no such folder"),
        ({"undo": True}, "--undo takes a placement back"),
        ({"undo": True, "ep": None, "from_run": None}, "has no placement.json, nor has its run"),
    ],
)
def test_questions_that_cannot_be_answered(arguments, expected, scene, tmp_path):
    if arguments.get("from_run"):
        arguments = arguments | {"from_run": scene / arguments["from_run"]}
    refused(scene / "run" / "checkpoint" / "step-7", scene, tmp_path, expected, **arguments)


def test_sources_that_are_none(scene, tmp_path):
    step = saved(tmp_path / "cut")
    weights = next(step.glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(step, scene, tmp_path, f"{weights} is cut")
    folder = tmp_path / "hf"
    folder.mkdir()
    refused(folder, scene, tmp_path, "neither .metadata nor *.safetensors nor checkpoint/step-N")
    gate = {"model.layers.0.mlp.gate.weight": torch.zeros(4, 2)}
    save_file(gate, folder / "model.safetensors")
    refused(folder, scene, tmp_path, "it has no MoE layer that is known")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for rest, expected in (
        (whole[:-4], "is cut: it has"),
        (whole[:20], "is cut, or no safetensors"),
    ):
        file.write_bytes(rest)
        refused(folder, scene, tmp_path, expected)
    file.write_bytes(whole)
    index = {"weight_map": {"a": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, scene, tmp_path, "model-2.safetensors is missing")


def test_targets_that_cannot_be(scene, tmp_path):
    run = scene / "run"
    (tmp_path / "there").mkdir()
    for output, expected in (
        (tmp_path / "there", "exists: name a new folder"),
        (tmp_path / "no" / "new", "is no folder that can be written to"),
        (run / "checkpoint" / "step-8", "would be a step among those of a run"),
    ):
        with pytest.raises(JobError, match=expected):
            place(run, output=output, ep=2)
    assert not list((tmp_path / "there").iterdir())


def test_a_disk_that_fills_half_way_leaves_nothing(scene, tmp_path):
    """The system refuses to write, because files may not exceed a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = sum(file.stat().st_size for file in (scene / "run").rglob("*.distcp")) // 2
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
        refused(scene / "run", scene, tmp_path, "could not be written", "nothing of it is left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    place(scene / "run", output=tmp_path / "new", ep=2)


def test_what_reads_back_otherwise_is_not_kept(scene, tmp_path, monkeypatch):
    from titan_moe_lb.commands.place import checkpoint_files, distributed

    def faulty(source, begin, length, target, advance) -> None:
        checkpoint_files.copy_span(source, begin, length - 1, target, advance)
        target.write(b"x")

    monkeypatch.setattr(distributed, "copy_span", faulty)
    refused(scene / "run", scene, tmp_path, "reads back otherwise than it was written")


def test_quantized_experts_move_with_their_scales(scene, tmp_path):
    """The tensors have DeepSeek-V3's names and float8 types; whole tensors move across files."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for number in (1, 2):
        prefix = f"model.layers.{number}.mlp"
        tensors = {f"{prefix}.gate.weight": torch.rand(E, 4)}
        for expert in range(E):
            name = f"{prefix}.experts.{expert}.up_proj.weight"
            tensors[name] = torch.rand(4, 4).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(1)
        names = sorted(tensors)
        for part in (0, 1):
            of_part = {name: tensors[name] for name in names[part::2]}
            save_file(of_part, folder / f"model-{number}-{part}.safetensors")
    file = placement_file(tmp_path / "p.json")
    place(folder, output=tmp_path / "new", file=file)

    def everything(where: Path) -> dict[str, torch.Tensor]:
        return {k: v for f in where.glob("*.safetensors") for k, v in load_file(f).items()}

    first, new = everything(folder), everything(tmp_path / "new")
    for name, tensor in new.items():
        head, _, tail = name.partition("experts.")
        if tail:
            expert, _, rest = tail.partition(".")
            theirs = first[f"{head}experts.{E - 1 - int(expert)}.{rest}"]
        else:
            theirs = first[name].flip(0)
        assert tensor.dtype == theirs.dtype
        assert torch.equal(tensor.float(), theirs.float())
