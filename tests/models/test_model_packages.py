"""Tests of the model packages in the registry: defaults, their descriptions, flavors."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path

import pytest
import tomli
from rich.console import Console
from torchtitan.models.common.moe import MoE

from model_registry.entry import Default, registry_entry
from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.router import LoadBalancedRouter
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import catalog, job_config, job_files, module_lookup
from titan_moe_lb.run import launch

MODELS = module_lookup.registered_models()
# [model] of the flavors that differ, and of "" all others; as a job file would say it.
V3_LOSS = '{type = "sequence_wise", weight = 0.0001, count_from = "scores"}'
V2_LOSSES = (
    '{type = "sequence_wise", weight = 0.003}, '
    '{type = "device_level", weight = 0.05, num_device_groups = 8}, '
    '{type = "communication", weight = 0.02, num_device_groups = 8, devices_per_token = 3}'
)
EXPECTED = {
    "deepseek_v3": {
        "": ('{type = "sign"}', f"[{V3_LOSS}]"),
        "16B": ('"none"', '[{type = "sequence_wise", weight = 0.001}]'),
        "236B": ('"none"', f"[{V2_LOSSES}]"),
    },
    "qwen3": {"": ('"none"', '[{type = "global_batch", weight = 0.001}]')},
    "gpt_oss": {"": ('"none"', '[{type = "batch_wise", weight = 0.001}]')},
    "llama4": {"": ('{type = "sign"}', '[{type = "batch_wise", weight = 0.001}]')},
}
FLAVORS = [
    (model, flavor)
    for model in MODELS
    for flavor in importlib.import_module(f"model_registry.{model}").FLAVORS
]


def package(model: str):
    return importlib.import_module(f"model_registry.{model}")


@pytest.mark.parametrize(("model", "flavor"), FLAVORS)
def test_every_moe_layer_has_the_defaults_of_the_flavor(model, flavor):
    expected = EXPECTED[model].get(flavor, EXPECTED[model][""])
    spec = package(model).model_registry(flavor)
    layers = list(spec.model.traverse(MoE.Config))
    assert layers
    for _fqn, moe, _parent, _attribute in layers:
        router = moe.router
        assert isinstance(router, LoadBalancedRouter.Config)
        said = (toml_tables.inline(router.expert_bias), toml_tables.inline(router.aux_losses))
        assert said == expected
        assert (moe.load_balance_coeff is None) == (router.expert_bias is None)
    kept = (spec.arguments["expert_bias"], spec.arguments["aux_losses"])
    assert tuple(map(toml_tables.inline, kept)) == expected


@pytest.mark.parametrize("flavor", ["16B", "236B"])
def test_what_a_job_says_beats_the_default_of_the_flavor(flavor):
    """A key of [model] keeps the flavor's default of the other key; None is a value."""
    start = ["--module", "deepseek_v3", "--config", f"deepseek_v3_{flavor.lower()}"]
    bias = job_config.load([*start, "--model.expert_bias", '{type = "sign"}'], 8).config.model_spec
    assert bias.arguments["expert_bias"] == SignBias.Config()
    losses = toml_tables.inline(bias.arguments["aux_losses"])
    assert losses == EXPECTED["deepseek_v3"][flavor][1]
    without = package("deepseek_v3").model_registry(flavor, aux_losses=None)
    assert without.arguments["aux_losses"] is None


@pytest.mark.parametrize(
    ("default", "message"),
    [
        (Default("aux_losses", [], "", flavors=("smal",)), "flavor 'smal'; did you mean 'small'"),
        (Default("aux_loss", [], ""), "default of 'aux_loss'; did you mean 'aux_losses'"),
    ],
)
def test_default_of_nothing_is_refused(default, message):
    with pytest.raises(JobError, match=message):
        registry_entry("mine", ("small", "large"), [default])


@pytest.mark.parametrize(("model", "flavor"), FLAVORS)
def test_every_flavor_has_a_config_function(model, flavor):
    registry = module_lookup.config_registry(model)
    name = module_lookup.config_of_flavor(registry, flavor)
    assert module_lookup.config_function(registry, name)().model_spec.flavor == flavor


@pytest.mark.parametrize("model", MODELS)
def test_every_default_has_a_source_and_a_flavor(model):
    module = package(model)
    assert all(default.source for default in module.DEFAULTS)
    assert all(catalog.flavors_with(module, default) for default in module.DEFAULTS)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_flavor_names_the_nearest(model):
    flavor = package(model).FLAVORS[0]
    with pytest.raises(JobError, match=f"{model} has no flavor .* did you mean '{flavor}'"):
        package(model).model_registry(flavor + "x")


@pytest.mark.parametrize("width", [80, 160])
def test_list_shows_every_model_job_and_default(width):
    file = io.StringIO()
    catalog.show(Console(file=file, width=width, highlight=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = file.getvalue()
    words = _words(shown)
    for model in MODELS:
        assert f"--module {model}" in lines
        registry = module_lookup.config_registry(model)
        names = job_files.names(model)
        assert names, model
        for name in [*module_lookup.config_names(registry), *names]:
            assert re.search(rf"^  {re.escape(name)} ", shown, re.MULTILINE), name
        for default in package(model).DEFAULTS:
            assert _words(default.source) <= words
            assert _words(catalog.flavors_with(package(model), default)) <= words


@pytest.mark.parametrize("model", MODELS)
def test_documentation_tells_the_same_defaults(model):
    text = (Path(__file__).parents[2] / "docs" / "reference" / "models.md").read_text()
    for default in package(model).DEFAULTS:
        flavors = catalog.flavors_with(package(model), default)
        value = f"`{default.key} = {toml_tables.inline(default.value)}`"
        line = f"| `{model}` | {flavors} | {value} | {default.source} |"
        assert line in text, line


def test_list_flag_stops_after_the_list(capsys):
    launch.main(["--list"])
    assert "--module deepseek_v3" in capsys.readouterr().out


def test_a_job_of_a_cluster_is_printed_where_it_cannot_start(capsys, monkeypatch):
    monkeypatch.delenv("NGPU", raising=False)
    launch.main(["--job-config", "configs/deepseek_v3/671b.toml", "--print-config"])
    assert tomli.loads(capsys.readouterr().out)["job"]["ranks"] == 2048


def test_help_shows_keys_losses_and_flags(capsys):
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
        "moves the bias",
        "Tokens of training",
        "--training.steps",
    ):
        assert text in shown
    keys = job_config.model_keys(package("qwen3").model_registry)
    assert list(keys) == [
        "attn_backend",
        "moe_comm_backend",
        "aux_losses",
        "expert_bias",
        "forced_routing",
        "routing",
        "score_func",
        "freeze",
    ]


def _words(text: str) -> set[str]:
    return set(text.split())
