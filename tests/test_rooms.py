"""Every room of the registry: its defaults, what tells of them, its flavors."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from torchtitan.models.common.moe import MoE

from titan_moe_lb import launch, toml_tables
from titan_moe_lb.errors import JobError
from titan_moe_lb.expert_bias import SignBias
from titan_moe_lb.job import catalog, job_config, module_lookup
from titan_moe_lb.router import LoadBalancedRouter

ROOMS = module_lookup.registered_models()
# Speed of the sign rule of the bias; type of the loss, weight and what else is not the loss's default.
EXPECTED = {
    "deepseek_v3": (1e-3, "sequence_wise", 1e-4, {"count_from": "scores"}),
    "qwen3": (None, "global_batch", 1e-3, {}),
    "gpt_oss": (None, "batch_wise", 1e-3, {}),
    "llama4": (1e-3, "batch_wise", 1e-3, {}),
}
FLAVORS = [
    (room, flavor)
    for room in ROOMS
    for flavor in importlib.import_module(f"model_registry.{room}").FLAVORS
]


def entry(room: str):
    return importlib.import_module(f"model_registry.{room}")


@pytest.mark.parametrize(("room", "flavor"), FLAVORS)
def test_every_moe_layer_has_the_defaults(room, flavor):
    speed, kind, weight, others = EXPECTED[room]
    layers = list(entry(room).model_registry(flavor).model.traverse(MoE.Config))
    assert layers
    for _fqn, moe, _parent, _attribute in layers:
        assert (moe.load_balance_coeff is not None) == (speed is not None)
        bias = moe.router.expert_bias
        assert bias == (SignBias.Config(speed=speed) if speed is not None else None)
        assert isinstance(moe.router, LoadBalancedRouter.Config)
        (loss,) = moe.router.aux_losses
        assert (loss._owner.type_name, loss.weight) == (kind, weight)
        defaults = toml_tables.dump(type(loss)(weight=weight))
        assert toml_tables.dump(loss) == {**defaults, **others}


@pytest.mark.parametrize(("room", "flavor"), FLAVORS)
def test_every_flavor_has_a_config_function(room, flavor):
    registry = module_lookup.config_registry(room)
    name = module_lookup.config_of_flavor(registry, flavor)
    assert module_lookup.config_function(registry, name)().model_spec.flavor == flavor


@pytest.mark.parametrize("room", ROOMS)
def test_declared_defaults_are_what_the_entry_attaches(room):
    module = entry(room)
    spec = module.model_registry("tiny")
    moe = next(iter(spec.model.traverse(MoE.Config)))[1]
    attached = {
        "expert_bias": moe.router.expert_bias,
        "aux_losses": moe.router.aux_losses,
    }
    assert {default.key: default.value for default in module.DEFAULTS} == attached
    assert all(default.source for default in module.DEFAULTS)


@pytest.mark.parametrize("room", ROOMS)
def test_unknown_flavor_names_the_nearest(room):
    flavor = entry(room).FLAVORS[0]
    with pytest.raises(JobError, match=f"{room} has no flavor .* did you mean '{flavor}'"):
        entry(room).model_registry(flavor + "x")


@pytest.mark.parametrize("width", [80, 160])
def test_list_shows_every_model_job_and_default(width):
    file = io.StringIO()
    catalog.show(Console(file=file, width=width, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = file.getvalue()
    words = _words(shown)
    for room in ROOMS:
        assert f"--module {room}" in lines
        registry = module_lookup.config_registry(room)
        names = [path.name for path in (catalog.CONFIGS / room).glob("*.toml")]
        assert names, room
        for name in [*module_lookup.config_names(registry), *names]:
            assert re.search(rf"^  {re.escape(name)} ", shown, re.MULTILINE), name
        for default in entry(room).DEFAULTS:
            assert _words(default.source) <= words


@pytest.mark.parametrize("room", ROOMS)
def test_documentation_tells_the_same_defaults(room):
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    for default in entry(room).DEFAULTS:
        line = f"`{default.key} = {toml_tables.inline(default.value)}` | {default.source} |"
        assert line in text, line


def test_list_flag_stops_after_the_list(capsys):
    launch.main(["--list"])
    assert "--module deepseek_v3" in capsys.readouterr().out


def test_help_shows_keys_losses_and_flags(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as stop:
        launch.main(["--module", "qwen3", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for text in (
        "--list",
        "[model] of qwen3",
        "moe_comm_backend",
        'type = "global_batch"',
        "one of 'previous_step',",
        'type = "frozen"',
        "what moves the bias",
        "The tokens of training",
        "--training.steps",
    ):
        assert text in shown
    keys = job_config.model_keys(entry("qwen3").model_registry)
    assert list(keys) == [
        "attn_backend",
        "moe_comm_backend",
        "aux_losses",
        "expert_bias",
        "forced_routing",
    ]


def _words(text: str) -> set[str]:
    return set(text.split())
