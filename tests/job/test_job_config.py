"""Job files and command lines: what they resolve to, and what they say when they are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.metrics import MetricsProcessor

from model_registry.deepseek_v3.config_registry import deepseek_v3_tiny
from titan_moe_lb.balancing.expert_bias import SignBias
from titan_moe_lb.balancing.value_schedule import Change
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.rules import files

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*.toml"))
JOB = '[job]\nmodule = "deepseek_v3"\nconfig = "deepseek_v3_tiny"\n'


def job_file(tmp_path, text: str) -> list[str]:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return ["--job-config", str(path)]


def test_command_line_beats_toml_beats_registry(tmp_path):
    arguments = job_file(tmp_path, JOB + "[training]\nsteps = 7\nlocal_batch_size = 4\n")
    config = job_config.load([*arguments, "--training.steps", "9"]).config
    assert config.training.steps == 9  # command line
    assert config.training.local_batch_size == 4  # TOML
    assert config.training.seq_len == 128  # registry


def test_model_table_and_flags_reach_the_routers(tmp_path):
    text = (
        JOB
        + '[model]\nexpert_bias = "none"\n[model.aux_losses]\ntype = "sequence_wise"\nweight = 0.5\n'
    )
    arguments = job_file(tmp_path, text)
    spec = job_config.load(arguments).config.model_spec
    moe = spec.model.layers[-1].moe
    assert moe.load_balance_coeff is None and moe.router.expert_bias is None
    assert [loss.weight for loss in moe.router.aux_losses] == [0.5]
    spec = job_config.load([*arguments, "--model.aux_losses", "[]"]).config.model_spec
    assert spec.model.layers[-1].moe.router.aux_losses == []


def test_values_that_change_come_from_tables_and_flags(tmp_path):
    text = JOB + '[model.expert_bias]\ntype = "sign"\nspeed = 0.01\n'
    text += "[[model.expert_bias.changes]]\ntokens = 14.3e12\nvalue = 0.0\n"
    arguments = job_file(tmp_path, text)
    config = job_config.load(arguments).config
    changes = [Change(tokens=14.3e12, value=0.0)]
    rule = SignBias.Config(speed=0.01, changes=changes, num_experts=8, top_k=2)
    assert config.model_spec.model.layers[-1].moe.router.expert_bias == rule
    printed = job_config.render(job_config.draft(arguments).table, config)
    assert (
        rule.changes
        == job_config.load(job_file(tmp_path, printed))
        .config.model_spec.model.layers[-1]
        .moe.router.expert_bias.changes
    )
    flag = '{type = "sign", changes = [{step = 3, value = 1e-2}, {step = 5, value = 0.0}]}'
    config = job_config.load([*arguments, "--model.expert_bias", flag]).config
    rule = config.model_spec.model.layers[-1].moe.router.expert_bias
    assert [(change.step, change.value) for change in rule.changes] == [(3, 1e-2), (5, 0.0)]


def test_a_foreign_model_keeps_its_own_bias(tmp_path):
    """torchtitan's coefficient is the speed of the sign rule."""
    module = ["--module", "torchtitan.models.deepseek_v3", "--config", "deepseek_v3_debugmodel"]
    flags = [*module, "--training.disable_cuda_graphs", "--model.aux_losses=[]"]
    sign = SignBias.Config(speed=1e-3, num_experts=8, top_k=3)
    for given, rule in (([], sign), (["--model.expert_bias=none"], None)):
        moe = job_config.load([*flags, *given]).config.model_spec.model.layers[-1].moe
        assert moe.router.expert_bias == rule
        assert (moe.load_balance_coeff is None) == (rule is None)


def test_a_module_of_ones_own_takes_the_keys_of_the_registry(tmp_path):
    """Its config function starts from a job of the registry: what [model] names is replaced."""
    bias = ["--model.expert_bias", '{type = "sign", speed = 0.1}']
    for given in (bias, [*bias, "--model.aux_losses=[]"], ["--model.aux_losses=[]"]):
        own, registry = (
            job_config.load(["--module", module, "--config", config, *given]).config
            for module, config in (
                ("tests.support.failing_jobs", "tiny"),
                ("deepseek_v3", "deepseek_v3_tiny"),
            )
        )
        assert repr(own.model_spec.model) == repr(registry.model_spec.model)


def test_mtp_takes_the_loss_that_fits(tmp_path):
    config = job_config.load(job_file(tmp_path, JOB + "[model]\nnum_mtp_layers = 1\n")).config
    assert type(config.loss).__qualname__ == "MTPLoss.Config"


def test_a_model_without_a_room_can_be_balanced(tmp_path):
    text = '[job]\nmodule = "torchtitan.models.deepseek_v3"\nconfig = "deepseek_v3_debugmodel"\n'
    text += '[model]\naux_losses = [{type = "sequence_wise", weight = 1e-3}]\n'
    text += "[training]\ndisable_cuda_graphs = true\n"
    draft = job_config.draft(job_file(tmp_path, text))
    config = draft.resolve(1).config
    assert config.model_spec.model.layers[-1].moe.router.aux_losses[0].weight == 1e-3
    printed = job_config.render(draft.table, config)
    assert tomli.loads(printed)["model"]["aux_losses"][0]["weight"] == 1e-3
    assert f"local_batch_size = {config.training.local_batch_size}" in printed.splitlines()[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_printed_config_resolves_to_the_same_job(path, tmp_path):
    ranks = tomli.loads(path.read_text())["job"]["ranks"]
    first = job_config.draft(["--job-config", str(path)])
    job = first.resolve(ranks)
    printed = job_config.render(first.table, job.config)
    second = job_config.draft(job_file(tmp_path, printed))
    again = second.resolve(ranks)
    assert _values(again) == _values(job)
    assert job_config.render(second.table, again.config) == printed


def _values(job: Job) -> str:
    """Every value of the config; initializers are functions, whose addresses differ."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(job.config.to_dict()))


BATCH_WISE = '[model.aux_losses]\ntype = "batch_wise"\nweight = 1.0\n'
RUNNING = '[model.aux_losses]\ntype = "global_batch"\nweight = 1.0\ncounts = "running"\n'
PIPELINE = (
    '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "{}"\n'
    "pipeline_parallel_microbatch_size = {}\n"
)
WRONG_FILES = {
    "unknown section": (
        JOB + "[trainign]\nsteps = 1\n",
        "no section [trainign]; did you mean 'training'?",
    ),
    "unknown key": (
        JOB + "[training]\nstpes = 1\n",
        "[training] has no key 'stpes'; did you mean 'steps'?",
    ),
    "unknown job key": ('[job]\nmodul = "x"\n', "[job] has no key 'modul'; did you mean 'module'?"),
    "wrong type": (
        JOB + '[training]\nsteps = "ten"\n',
        "[training] steps is 'ten'; it must be an integer",
    ),
    "bool for int": (
        JOB + "[training]\nsteps = true\n",
        "[training] steps is true; it must be an integer",
    ),
    "float for int": (
        JOB + "[training]\nsteps = 1.5\n",
        "[training] steps is 1.5; it must be an integer",
    ),
    "section is no table": (
        JOB.replace("[job]", "training = 3\n[job]"),
        "training is 3; it must be a table",
    ),
    "outside the choice": (
        JOB + '[training]\nmixed_precision_param = "bfloat32"\n',
        "must be one of 'bfloat16', 'float32'; did you mean",
    ),
    "out of range": (
        JOB + "[training]\nlocal_batch_size = 0\n",
        "training.local_batch_size is 0; it must be at least 1",
    ),
    "negative steps": (JOB + "[training]\nsteps = -3\n", "training.steps is -3"),
    "bad TOML": ("[job\n", "not valid TOML"),
    "unknown module": ('[job]\nmodule = "deepseek_v4"\n', "did you mean 'deepseek_v3'?"),
    "unknown config": (JOB.replace("_tiny", "_tinny"), "did you mean 'deepseek_v3_tiny'?"),
    "unknown flavor": (
        '[job]\nmodule = "deepseek_v3"\nflavor = "67B"\n',
        "no config for flavor '67B'; did you mean '671B'?",
    ),
    "unknown loss": (
        JOB + '[model]\naux_losses = [{type = "sequence_wize", weight = 1.0}]\n',
        "did you mean 'sequence_wise'?",
    ),
    "loss without type": (
        JOB + "[model]\naux_losses = [{weight = 1.0}]\n",
        "aux_losses[0] needs a type; valid:",
    ),
    "loss without weight": (
        JOB + '[model]\naux_losses = ["sequence_wise"]\n',
        "aux_losses[0] needs 'weight'",
    ),
    "negative weight": (
        JOB + '[model.aux_losses]\ntype = "sequence_wise"\nweight = -1.0\n',
        "aux loss weight is -1.0",
    ),
    "NaN weight": (
        JOB + '[model.aux_losses]\ntype = "sequence_wise"\nweight = nan\n',
        "aux loss weight is nan",
    ),
    "filled by the job": (
        JOB + '[model.aux_losses]\ntype = "sequence_wise"\nweight = 1.0\nglobal_batch_size = 3\n',
        "has no key 'global_batch_size'",
    ),
    "two of one kind": (
        JOB
        + '[model]\naux_losses = [{type = "sequence_wise", weight = 1.0}, {type = "sequence_wise", weight = 2.0}]\n',
        '[model] aux_losses has two of type "sequence_wise"',
    ),
    "no MoE layer": (
        '[job]\nmodule = "llama3"\nconfig = "llama3_debugmodel"\n[model.aux_losses]\ntype = "sequence_wise"\nweight = 1.0\n',
        "has no MoE layer",
    ),
    "bias speed": (
        JOB + '[model.expert_bias]\ntype = "sign"\nspeed = -1.0\n',
        "[model] expert_bias: expert_bias speed is -1.0",
    ),
    "unknown bias rule": (
        JOB + '[model]\nexpert_bias = "sing"\n',
        "expert_bias type 'sing' does not exist; did you mean 'sign'?",
    ),
    "two bias rules": (
        JOB + '[model]\nexpert_bias = [{type = "sign"}, {type = "frozen"}]\n',
        "expert_bias is [{'type': 'sign'}, {'type': 'frozen'}]; it must be one table with a type",
    ),
    "torchtitan's name for the bias rule": (
        JOB + '[model]\nexpert_bias = "frozen"\nload_balance_coeff = 1e-3\n',
        "[model] load_balance_coeff: a job has one rule of the expert bias, and it is set in "
        'expert_bias, as in expert_bias = {type = "sign", speed = 0.001}',
    ),
    "changes out of order": (
        JOB
        + '[model.expert_bias]\ntype = "sign"\n'
        + "changes = [{step = 20, value = 0.0}, {step = 10, value = 1e-3}]\n",
        "[model] expert_bias: expert_bias changes: step 10 does not come after 20",
    ),
    "change with a wrong key": (
        JOB + '[model.expert_bias]\ntype = "sign"\nchanges = [{steps = 20, value = 0.0}]\n',
        "[model] expert_bias changes[0] has no key 'steps'; did you mean 'step'?",
    ),
    "change without a value": (
        JOB + '[model.expert_bias]\ntype = "sign"\nchanges = [{step = 20}]\n',
        "[model] expert_bias changes[0] needs 'value'",
    ),
    "change that is no table": (
        JOB + '[model.expert_bias]\ntype = "sign"\nchanges = [20]\n',
        "[model] expert_bias changes[0] is 20; it must be a table",
    ),
    "unknown checkpointing": (
        JOB + '[activation_checkpoint]\ntype = "ful"\n',
        "did you mean 'full'?",
    ),
    "ZBV + selective": (
        JOB
        + '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "ZBVZeroBubble"\n'
        + '[activation_checkpoint]\ntype = "selective"\n',
        "selective activation checkpointing does not survive",
    ),
    "DualPipeV + few micro-batches": (
        JOB + PIPELINE.format("DualPipeV", 2) + "[training]\nlocal_batch_size = 4\n",
        "the DualPipeV schedule needs a micro-batch for each of 4 stages, and "
        "training.local_batch_size 4 makes 2 of parallelism.pipeline_parallel_microbatch_size 2: "
        "set training.local_batch_size to 8",
    ),
    "1F1B + few micro-batches": (
        JOB + PIPELINE.format("1F1B", 1) + "[training]\nlocal_batch_size = 1\n",
        "the 1F1B schedule needs a micro-batch for each of 2 stages",
    ),
    "Interleaved1F1B + rounds": (
        JOB + PIPELINE.format("Interleaved1F1B", 2) + "[training]\nlocal_batch_size = 10\n",
        "the Interleaved1F1B schedule needs a multiple of 2 micro-batches, and "
        "training.local_batch_size 10 makes 5 of parallelism.pipeline_parallel_microbatch_size 2: "
        "set training.local_batch_size to 12",
    ),
    "ZBV + three stages a rank": (
        JOB + PIPELINE.format("ZBVZeroBubble", 1) + "pipeline_parallel_layers_per_stage = 1\n",
        "parallelism.pipeline_parallel_layers_per_stage makes 6 stages; the ZBVZeroBubble "
        "schedule needs 4 stages with parallelism.pipeline_parallel_degree 2",
    ),
    "stages by hand": (
        JOB
        + PIPELINE.format("Interleaved1F1B", 1)
        + 'module_fqns_per_model_part = [["tok_embeddings"], ["layers.0", "layers.1"], '
        + '["layers.2", "layers.3", "norm", "lm_head"]]\n',
        "parallelism.module_fqns_per_model_part makes 3 stages; the Interleaved1F1B schedule "
        "needs as many stages on each rank with parallelism.pipeline_parallel_degree 2",
    ),
    **{
        f"stages by hand: {problem}": (
            JOB + PIPELINE.format("1F1B", 1) + f"module_fqns_per_model_part = {stages}\n",
            line,
        )
        for problem, stages, line in (
            (
                "unknown",
                '[["tok_embeddings", "layers.0"], ["layer.1", "norm", "lm_head"]]',
                "parallelism.module_fqns_per_model_part names 'layer.1'; did you mean 'layers.1'?",
            ),
            (
                "none",
                "[]",
                "parallelism.module_fqns_per_model_part leaves 'tok_embeddings' out: give it to a",
            ),
            (
                "left out",
                '[["tok_embeddings", "layers.0", "layers.1"], ["layers.3", "norm", "lm_head"]]',
                "parallelism.module_fqns_per_model_part leaves 'layers.2' out: give it to a stage",
            ),
            (
                "twice",
                '[["tok_embeddings", "layers.0", "layers.1"], '
                '["layers.1", "layers.2", "layers.3", "norm", "lm_head"]]',
                "parallelism.module_fqns_per_model_part names 'layers.1' twice",
            ),
            (
                "order",
                '[["tok_embeddings", "layers.2", "layers.3"], '
                '["layers.0", "layers.1", "norm", "lm_head"]]',
                "parallelism.module_fqns_per_model_part has 'layers.2' in stage 1 and 'layers.1', "
                "which comes before it, in stage 2: give them in the model's order",
            ),
        )
    },
    "CP + a stage without a layer": (
        JOB
        + "[training]\nseq_len = 256\n"
        + PIPELINE.format("Interleaved1F1B", 1)
        + "context_parallel_degree = 2\n",
        "stage 4 of 4 of the pipeline has no layer, which torchtitan 0.3.0 cannot cut for "
        "parallelism.context_parallel_degree 2: set "
        "parallelism.pipeline_parallel_last_stage_less_layers to 0",
    ),
    "partial_dtensor + TP + one sequence": (
        JOB
        + "[training]\nlocal_batch_size = 1\nglobal_batch_size = 4\n"
        + '[parallelism]\ntensor_parallel_degree = 2\nspmd_backend = "partial_dtensor"\n',
        'parallelism.spmd_backend = "partial_dtensor" loses the gradient through the experts under '
        "parallelism.tensor_parallel_degree with one sequence a forward, and does not say so: set "
        'parallelism.spmd_backend = "spmd_types"',
    ),
    "full_dtensor + CP + one sequence": (
        JOB
        + "[training]\nlocal_batch_size = 1\nglobal_batch_size = 4\nseq_len = 256\n"
        + '[parallelism]\ncontext_parallel_degree = 2\nspmd_backend = "full_dtensor"\n',
        'parallelism.spmd_backend = "full_dtensor" loses the gradient of keys and values under '
        "parallelism.context_parallel_degree with one sequence a forward",
    ),
    "full_dtensor + compile + CP": (
        JOB
        + "[compile]\nenable = true\n[training]\nseq_len = 256\n"
        + '[parallelism]\ncontext_parallel_degree = 2\nspmd_backend = "full_dtensor"\n',
        'parallelism.spmd_backend = "full_dtensor" cannot be compiled with context parallelism',
    ),
    "full_dtensor + compile + TP + EP": (
        JOB
        + "[compile]\nenable = true\n[parallelism]\ntensor_parallel_degree = 2\n"
        + 'expert_parallel_degree = 2\nspmd_backend = "full_dtensor"\n',
        'set parallelism.spmd_backend = "spmd_types", or compile.enable = false',
    ),
    "batch-wise + PP": (
        JOB + BATCH_WISE + "[parallelism]\npipeline_parallel_degree = 2\n",
        "batch-wise aux loss is incompatible with pipeline parallelism because per-micro-batch "
        "token-to-expert counts do not reflect the full batch; put this line under [model] to "
        "count the whole batch (over the previous step): "
        'aux_losses = [{type = "global_batch", weight = 1.0}]',
    ),
    "batch-wise and z-loss + PP": (
        JOB
        + '[model]\naux_losses = [{type = "batch_wise", weight = 0.02, count_from = "scores"}, '
        + '{type = "z_loss", weight = 1e-4}]\n[parallelism]\npipeline_parallel_degree = 2\n',
        'aux_losses = [{type = "global_batch", weight = 0.02, count_from = "scores"}, '
        '{type = "z_loss", weight = 0.0001}]',
    ),
    "GPT-OSS's default + PP": (
        '[job]\nmodule = "gpt_oss"\n[parallelism]\npipeline_parallel_degree = 2\n',
        'aux_losses = [{type = "global_batch", weight = 0.001}]',
    ),
    "longer than the model": (
        '[job]\nmodule = "qwen3"\n[training]\nseq_len = 8192\n',
        "Training sequence length 8192 exceeds attention RoPE maximum supported sequence length 4096",
    ),
    "TP and heads": (
        JOB + "[training]\nseq_len = 192\n[parallelism]\ntensor_parallel_degree = 3\n",
        "tensor_parallel_degree (3) must divide n_heads (4)",
    ),
    "TP and key-value heads": (
        '[job]\nmodule = "qwen3"\nflavor = "tiny"\n[parallelism]\ntensor_parallel_degree = 4\n',
        "tensor_parallel_degree (4) must divide n_kv_heads (2)",
    ),
    "GPT-OSS + TP": (
        '[job]\nmodule = "gpt_oss"\n[parallelism]\ntensor_parallel_degree = 2\n',
        "gets the biases of GPT-OSS wrong under this tensor parallelism: set "
        "parallelism.tensor_parallel_degree to 1, or expert_parallel_degree above 1",
    ),
    "tied weights + PP": (
        '[job]\nmodule = "torchtitan.models.qwen3"\nconfig = "qwen3_debugmodel"\n'
        "[training]\ndisable_cuda_graphs = true\n[parallelism]\npipeline_parallel_degree = 2\n",
        "Weight tying is not supported with Pipeline Parallel",
    ),
    "MTP + PP": (
        JOB + "[model]\nnum_mtp_layers = 1\n[parallelism]\npipeline_parallel_degree = 2\n",
        "MTP does not support pipeline parallelism yet",
    ),
    "batch-wise + accumulation": (
        JOB + BATCH_WISE + "[training]\nglobal_batch_size = 16\n",
        "batch-wise aux loss is incompatible with gradient accumulation",
    ),
    "memory budget": (
        JOB + '[activation_checkpoint]\ntype = "memory-budget"\n[compile]\nenable = true\n',
        'set type = "selective" or "full"',
    ),
    "unknown counts": (
        JOB + RUNNING.replace("running", "runing"),
        "must be one of 'previous_step', 'running'; did you mean 'running'?",
    ),
    "microbatches": (
        JOB
        + "[training]\nlocal_batch_size = 6\n[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_microbatch_size = 4\n",
        "local_batch_size",
    ),
    "processes": (JOB + "[parallelism]\ndata_parallel_replicate_degree = 3\n", "NGPU=3"),
    "experts": (
        JOB + "[parallelism]\ndata_parallel_shard_degree = 3\nexpert_parallel_degree = 3\n",
        "expert_parallel_degree 3 does not divide the 8 experts of layer 1",
    ),
    "global batch": (
        JOB + "[training]\nglobal_batch_size = 12\n",
        "global_batch_size 12 is not a multiple",
    ),
    "learning rate in quotes": (
        JOB + '[[optimizer.param_groups]]\noptimizer_kwargs = {lr = "3e-4"}\n',
        "lr is '3e-4'; it must be a finite number",
    ),
    "optimizer argument": (
        JOB + "[[optimizer.param_groups]]\noptimizer_kwargs = {lrr = 3e-4}\n",
        "AdamW has no argument 'lrr'; did you mean 'lr'?",
    ),
    "schedule in lower case": (
        JOB
        + '[parallelism]\npipeline_parallel_degree = 2\npipeline_parallel_schedule = "zbvzerobubble"\n',
        "did you mean 'ZBVZeroBubble'?",
    ),
    "compile backend": (
        JOB + '[compile]\nenable = true\nbackend = "inductr"\n',
        "compile.backend 'inductr' does not exist; did you mean 'inductor'?",
    ),
    "compile component": (
        JOB + '[compile]\nenable = true\ncomponents = ["model", "los"]\n',
        "compile.components 'los' does not exist; did you mean 'loss'?",
    ),
    "sequence length": (
        JOB + "[training]\nseq_len = 130\n[parallelism]\ncontext_parallel_degree = 2\n",
        "training.seq_len 130 is not divisible by 4",
    ),
    "type is a list": (
        JOB + '[activation_checkpoint]\ntype = ["full"]\n',
        "does not exist; did you mean 'full'?",
    ),
    "negative MTP layers": (JOB + "[model]\nnum_mtp_layers = -1\n", "num_mtp_layers is -1"),
    "no model": ("[training]\nsteps = 1\n", '[job] module = "deepseek_v3"'),
    "nothing to train": (
        JOB + "[optimizer]\nparam_groups = []\n",
        "[optimizer] param_groups is empty",
    ),
    "learning rate": (
        JOB + "[[optimizer.param_groups]]\noptimizer_kwargs = {lr = -1.0}\n",
        "lr is -1.0; it must be a finite number",
    ),
}
PROCESSES = {
    "DualPipeV + few micro-batches": 2,
    "1F1B + few micro-batches": 2,
    "Interleaved1F1B + rounds": 2,
    "ZBV + three stages a rank": 2,
    **{case: 2 for case in WRONG_FILES if case.startswith("stages by hand")},
    "CP + a stage without a layer": 4,
    "partial_dtensor + TP + one sequence": 2,
    "full_dtensor + CP + one sequence": 2,
    "full_dtensor + compile + CP": 2,
    "full_dtensor + compile + TP + EP": 2,
    "ZBV + selective": 2,
    "schedule in lower case": 2,
    "sequence length": 2,
    "batch-wise + PP": 2,
    "batch-wise and z-loss + PP": 2,
    "GPT-OSS's default + PP": 2,
    "TP and heads": 3,
    "TP and key-value heads": 4,
    "GPT-OSS + TP": 2,
    "tied weights + PP": 2,
    "MTP + PP": 2,
    "running counts + PP + checkpointing": 2,
    "microbatches": 2,
    "experts": 3,
}


def test_line_for_batch_wise_under_pipeline_parallelism_is_accepted(tmp_path):
    """The message names a line; the line works."""
    text, _expected = WRONG_FILES["batch-wise and z-loss + PP"]
    with pytest.raises(JobError) as error:
        job_config.load(job_file(tmp_path, text), 2)
    line = re.search(r"aux_losses = .*", str(error.value))[0]
    text = JOB + f"[model]\n{line}\n[parallelism]\npipeline_parallel_degree = 2\n"
    moe = job_config.load(job_file(tmp_path, text), 2).config.model_spec.model.layers[-1].moe
    first, second = moe.router.aux_losses
    assert (first.weight, first.count_from, second.weight) == (0.02, "scores", 1e-4)
    assert type(first).__qualname__ == "GlobalBatchAuxLoss.Config"


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_one_line(case, tmp_path):
    text, expected = WRONG_FILES[case]
    with pytest.raises(JobError) as error:
        job_config.load(job_file(tmp_path, text), PROCESSES.get(case, 1))
    message = str(error.value)
    assert expected in message
    assert "\n" not in message


def test_missing_file_and_missing_value():
    with pytest.raises(JobError, match=re.escape("--job-config nope.toml: there is no such file")):
        job_config.load(["--job-config", "nope.toml"])
    with pytest.raises(JobError, match="--module needs a value"):
        job_config.load(["--module"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda config: setattr(config, "metrics", MetricsProcessor.Config()),
            "validator.domains needs LoadBalanceMetricsProcessor.Config as the job's metrics",
        ),
        (
            lambda config: setattr(
                config.validator, "dataloader", ParallelAwareDataloader.Config()
            ),
            "validator.domains takes the place of validator.dataloader.dataset, and this loader",
        ),
        (
            lambda config: config.validator.domains.append(config.validator.domains[0]),
            "validator.domains names one dataset twice: ",
        ),
        (
            lambda config: config.validator.domains.append("python_mixed_held_aut"),
            "validator.domains 'python_mixed_held_aut' does not exist; ",
        ),
    ],
)
def test_domains_that_cannot_be_validated(change, expected):
    config = deepseek_v3_tiny()
    config.validator.enable = True
    files.domains_are_known(Job.of(config, 1))
    change(config)
    with pytest.raises(JobError, match=re.escape(expected)):
        files.domains_are_known(Job.of(config, 1))
