"""Tests of job files and command lines, and of the jobs that they resolve to."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.models.common.moe import MoE

from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb.balancing.expert_bias import FrozenBias, SignBias
from titan_moe_lb.balancing.value_schedule import Change
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config, renamed_keys
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import machine

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*.toml"))
JOB = '[job]\nmodule = "deepseek_v3"\nconfig = "deepseek_v3_tiny"\n'
SPARSE = '[job]\nmodule = "torchtitan.models.deepseek_v3"\nconfig = "deepseek_v3_debugmodel"\n'
"""torchtitan's own model, without an entry in the registry."""
PIPELINE = "[parallelism]\npipeline_parallel_degree = 2\n"


def job_file(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return ["--job-config", str(path)]


def last_moe(arguments: list[str], world_size: int = 1) -> MoE.Config:
    """The last MoE layer of a job."""
    return job_config.load(arguments, world_size).config.model_spec.model.layers[-1].moe


def resolved_and_printed(arguments: list[str], world_size: int = 1) -> tuple[Any, str]:
    """Resolve a job; return its config, and the TOML that ``--print-config`` prints."""
    draft = job_config.draft(arguments)
    config = draft.resolve(world_size).config
    return config, job_config.render(draft.table, config)


def test_command_line_beats_toml_beats_registry(tmp_path):
    arguments = job_file(tmp_path, JOB + "[training]\nsteps = 7\nlocal_batch_size = 4\n")
    training = job_config.load([*arguments, "--training.steps", "9"]).config.training
    assert training.steps == 9  # command line
    assert training.local_batch_size == 4  # TOML
    assert training.seq_len == 128  # registry


def test_model_table_and_flags_reach_the_routers(tmp_path):
    text = '[model]\nexpert_bias = "none"\naux_losses = {type = "sequence_wise", weight = 0.5}\n'
    arguments = job_file(tmp_path, JOB + text)
    moe = last_moe(arguments)
    assert moe.load_balance_coeff is None and moe.router.expert_bias is None
    assert [loss.weight for loss in moe.router.aux_losses] == [0.5]
    assert last_moe([*arguments, "--model.aux_losses", "[]"]).router.aux_losses == []


def test_values_that_change_come_from_tables_and_flags(tmp_path):
    text = JOB + '[model.expert_bias]\ntype = "sign"\nspeed = 0.01\n'
    text += "[[model.expert_bias.changes]]\ntokens = 14.3e12\nvalue = 0.0\n"
    text += 'until = 14.5e12\nshape = "cosine"\n'
    arguments = job_file(tmp_path, text)
    changes = [Change(tokens=14.3e12, value=0.0, until=14.5e12, shape="cosine")]
    rule = SignBias.Config(speed=0.01, changes=changes, num_experts=8, top_k=2)
    assert last_moe(arguments).router.expert_bias == rule
    flag = '{type = "sign", changes = [{step = 3, value = 1e-2}, {step = 5, value = 0.0}]}'
    rule = last_moe([*arguments, "--model.expert_bias", flag]).router.expert_bias
    assert [(change.step, change.value) for change in rule.changes] == [(3, 1e-2), (5, 0.0)]
    _config, printed = resolved_and_printed(arguments)
    assert last_moe(job_file(tmp_path, printed)).router.expert_bias.changes == changes


def test_frozen_layers_come_from_tables_and_are_printed(tmp_path):
    text = JOB + '[model.freeze]\ngate = ["1", 3]\nlosses = "2-3"\n'
    arguments = job_file(tmp_path, text)
    _config, printed = resolved_and_printed(arguments)
    for one in (arguments, job_file(tmp_path, printed)):
        assert last_moe(one).router.frozen == {"gate", "losses"}
        everything = last_moe([*one, '--model.freeze={bias = "all"}']).router
        assert everything.frozen == {"bias"} and everything.expert_bias == FrozenBias.Config(
            num_experts=8, top_k=2
        )
        assert last_moe([*one, "--model.freeze=none"]).router.frozen == frozenset()


def test_a_foreign_model_keeps_its_own_bias(tmp_path):
    """torchtitan's coefficient is the speed of the sign rule."""
    arguments = job_file(tmp_path, SPARSE + "[training]\ndisable_cuda_graphs = true\n")
    sign = SignBias.Config(speed=1e-3, num_experts=8, top_k=3, score_func="softmax")
    for given, rule in (([], sign), (["--model.expert_bias=none"], None)):
        moe = last_moe([*arguments, "--model.aux_losses=[]", *given])
        assert moe.router.expert_bias == rule
        assert (moe.load_balance_coeff is None) == (rule is None)


def test_a_module_of_ones_own_takes_the_keys_of_the_registry():
    """Its config function starts from a registry job; keys of [model] replace its values."""
    own = ["--module=tests.support.failing_jobs", "--config=tiny"]
    registry = ["--module=deepseek_v3", "--config=deepseek_v3_tiny"]
    bias = ["--model.expert_bias", '{type = "sign", speed = 0.1}']
    for given in (bias, [*bias, "--model.aux_losses=[]"], ["--model.aux_losses=[]"]):
        found, expected = (
            repr(job_config.load([*module, *given]).config.model_spec.model)
            for module in (own, registry)
        )
        assert found == expected


def test_mtp_takes_the_loss_that_fits(tmp_path):
    config = job_config.load(job_file(tmp_path, JOB + "[model]\nnum_mtp_layers = 1\n")).config
    assert type(config.loss).__qualname__ == "MTPLoss.Config"


def test_a_model_without_a_room_can_be_balanced(tmp_path):
    text = SPARSE + '[model]\naux_losses = [{type = "sequence_wise", weight = 1e-3}]\n'
    text += "[training]\ndisable_cuda_graphs = true\n"
    config, printed = resolved_and_printed(job_file(tmp_path, text))
    assert config.model_spec.model.layers[-1].moe.router.aux_losses[0].weight == 1e-3
    assert tomli.loads(printed)["model"]["aux_losses"][0]["weight"] == 1e-3
    assert f"local_batch_size = {config.training.local_batch_size}" in printed.splitlines()[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_printed_config_resolves_to_the_same_job(path, tmp_path):
    ranks = tomli.loads(path.read_text())["job"]["ranks"]
    config, printed = resolved_and_printed(["--job-config", str(path)], ranks)
    again, printed_again = resolved_and_printed(job_file(tmp_path, printed), ranks)
    assert _values(again) == _values(config)
    assert printed_again == printed


def _values(config: Any) -> str:
    """Every value of a config except initializers, which are functions with changing addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(config.to_dict()))


def test_line_for_batch_wise_under_pipeline_parallelism_is_accepted(tmp_path):
    """The line that the message proposes works."""
    batch_wise = '{type = "batch_wise", weight = 0.02, count_from = "scores"}'
    losses = f'aux_losses = [{batch_wise}, {{type = "z_loss", weight = 1e-4}}]'
    with pytest.raises(JobError) as error:
        job_config.load(job_file(tmp_path, f"{JOB}[model]\n{losses}\n{PIPELINE}"), 2)
    line = re.search(r"aux_losses = .*", str(error.value))[0]
    router = last_moe(job_file(tmp_path, f"{JOB}[model]\n{line}\n{PIPELINE}"), 2).router
    first, second = router.aux_losses
    assert (first.weight, first.count_from, second.weight) == (0.02, "scores", 1e-4)
    assert type(first).__qualname__ == "GlobalBatchAuxLoss.Config"


@pytest.mark.parametrize("module", ["deepseek_v3", "gpt_oss", "llama4", "qwen3"])
def test_the_other_name_of_a_key_is_one_that_a_job_has(module):
    config = job_config.load(["--module", module]).config
    for key in renamed_keys.RENAMED.values():
        found: Any = config
        for name in key.partition(",")[0].split("."):
            if name == "model":  # whose keys are the arguments of the registry entry
                found = job_config.model_keys(job_config.balanced)
            elif isinstance(found, (dict, list)):
                found = found[int(name) if name.isdecimal() else name]
            else:
                found = getattr(found, name)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(JOB, encoding="utf-8-sig")
    assert job_config.draft(["--job-config", str(file)]).table.config == "deepseek_v3_tiny"


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config, "metrics", MetricsProcessor.Config()),
        lambda config: setattr(config.validator, "dataloader", ParallelAwareDataloader.Config()),
        lambda config: config.validator.domains.append(config.validator.domains[0]),
        lambda config: config.validator.domains.append("python_mixed_held_aut"),
    ],
    ids=["metrics", "dataloader", "twice", "unknown"],
)
def test_domains_that_cannot_be_validated(change):
    config = deepseek_v3_tiny()
    config.validator.enable = True
    machine.domains_are_known(Job.of(config, 1))
    change(config)
    with pytest.raises(JobError, match="validator.domains"):
        machine.domains_are_known(Job.of(config, 1))


def test_a_job_file_imports_losses_of_ones_own(tmp_path, monkeypatch):
    """A file beside the job, from any current folder."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_zero_losses.py").write_text(
        "from titan_moe_lb import LogitsLoss\n"
        "class Zero(LogitsLoss):\n"
        "    type_name, metric_name = 'my_zero', 'my_zero_loss'\n"
        "    def per_token(self, logits_BLE):\n"
        "        return 0 * logits_BLE.sum(dim=-1)\n"
    )
    losses = 'aux_losses = [{type = "my_zero", weight = 1.0}]'
    text = JOB.replace("[job]", "[job]\nimports = ['my_zero_losses']") + f"[model]\n{losses}\n"
    (loss,) = last_moe(job_file(tmp_path, text), 1).router.aux_losses
    assert (loss._owner.type_name, loss.weight) == ("my_zero", 1.0)
