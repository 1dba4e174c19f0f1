"""Tests of the names of several runs."""

from __future__ import annotations

from pathlib import Path

from tests.support.synthetic_trace import run_info
from titan_moe_lb.traces.run_names import run_names

SEQUENCE, GLOBAL = "seq_load_balancing_loss", "global_load_balancing_loss"


def named(*changes):
    infos = [run_info(**change) for change in changes]
    files = [Path(f"/runs/{index}/moe_load.arrow") for index in range(len(infos))]
    return run_names(infos, files)


def test_a_run_is_named_by_the_one_setting_that_differs():
    for changes, names in (
        (
            [{"losses": {SEQUENCE: 1e-4}}, {"losses": {SEQUENCE: 0.01}}],
            ["weight 0.0001", "weight 0.01"],
        ),
        ([{"expert_bias": None}, {"expert_bias": "sign (speed 0.1)"}], ["no bias", "sign"]),
        (
            [{"expert_bias": "sign (speed 0.01)"}, {"expert_bias": "sign (speed 0.1)"}],
            ["sign (speed 0.01)", "sign (speed 0.1)"],
        ),
        ([{"learning_rate": 1e-3}, {"learning_rate": 3e-4}], ["lr 0.001", "lr 0.0003"]),
        ([{"seed": 1}, {"seed": 2}], ["seed 1", "seed 2"]),
        ([{"ep": 2}, {"ep": 4}], ["ep 2", "ep 4"]),
        ([{"schedule": None}, {"schedule": "1F1B"}], ["no schedule", "1F1B"]),
        ([{"is_foreign": True}, {}], ["another framework", "sign"]),
    ):
        found = named(*changes)
        assert found.names == names and found.not_named == []


def test_losses_that_all_runs_have_are_left_out():
    both = {"z_loss": 1e-3, SEQUENCE: 1e-4}
    found = named(
        {"losses": both}, {"losses": {"z_loss": 1e-3}}, {"losses": {"z_loss": 1e-3, GLOBAL: 1.0}}
    )
    assert found.names == ["seq load balancing", "no other loss", "global load balancing"]
    assert named({"losses": both}, {"losses": {}}).names == [
        "z + seq load balancing",
        "no aux loss",
    ]
    of_each = [{"losses": losses} for losses in ({GLOBAL: 0.1}, {GLOBAL: 0.2}, {SEQUENCE: 0.1}, {})]
    assert named(*of_each).names == [
        "global load balancing 0.1",
        "global load balancing 0.2",
        "seq load balancing 0.1",
        "no aux loss",
    ]


def test_fewest_settings_that_tell_all_runs_apart_and_the_others_are_listed():
    found = named(
        {"learning_rate": 1e-3, "seed": 1, "ep": 2, "world_size": 4},
        {"learning_rate": 1e-3, "seed": 2, "ep": 4, "world_size": 8},
        {"learning_rate": 1e-4, "seed": 1, "ep": 2, "world_size": 8},
    )
    assert found.names == ["lr 0.001, seed 1", "lr 0.001, seed 2", "lr 0.0001, seed 1"]
    assert found.not_named == ["ep", "world size"]


def test_a_setting_that_one_run_does_not_know_names_none():
    found = named({"seed": 1, "ep": 2}, {"seed": None, "ep": 4})
    assert found.names == ["ep 2", "ep 4"]


def test_runs_of_equal_settings_have_the_names_of_their_folders():
    def names(*folders):
        files = [Path("/runs", folder, "moe_load.arrow") for folder in folders]
        return run_names([run_info()] * len(files), files).names

    assert names("exp1/outputs") == ["outputs"]
    assert names("exp1/outputs", "exp2/outputs") == ["exp1", "exp2"]
    assert names("a/out", "b/out", "b/other") == ["a/out", "b/out", "other"]
    assert names("a", "a/b") == ["a", "b"]
    assert names("b/out", "b") == ["out", "b"]
    files = [Path("/runs/a.arrow"), Path("/runs/b.arrow")]
    assert run_names([run_info()] * 2, files).names == ["a.arrow", "b.arrow"]
    files = [Path(f"/runs/{name}/moe_load.arrow") for name in "xyz"]
    infos = [run_info(seed=1), run_info(seed=1), run_info(seed=2)]
    found = run_names(infos, files)
    assert found.names == ["x", "y", "z"] and found.not_named == ["seed"]
