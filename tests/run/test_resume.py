"""A run that goes on from a checkpoint: the same numbers, the same bias, or one line."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.bias_jobs import biases_of_a_run
from tests.support.train_jobs import load_checked, next_inputs, train
from titan_moe_lb.checkpoints.start import Checkpoint, damage, read_metadata, steps_in
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.rules.files import checkpoint_has_router_state, validate_files
from titan_moe_lb.run.console import summary
from titan_moe_lb.wiring.resume import MARKER

JOB = [
    "--config",
    "deepseek_v3_tiny",
    "--model.aux_losses",
    '[{type="global_batch", weight=0.1}]',
    "--training.steps=4",
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--checkpoint.no-last-save-model-only",
    "--debug.seed=1",
    "--debug.deterministic",
    "--parallelism.data_parallel_shard_degree=2",
]


def test_resumed_run_continues_bitwise(ranks, tmp_path):
    whole = ranks.run(2, train, [*JOB, f"--dump_folder={tmp_path}/whole"])
    folder = f"--dump_folder={tmp_path}/stopped"
    # The learning-rate schedule is that of four steps in both halves.
    first = ranks.run(
        2, train, [*JOB, folder, "--training.steps=2", "--lr_scheduler.total_steps=4"]
    )
    second = ranks.run(2, train, [*JOB, folder], first_step=3)

    def numbers(logged):
        return [
            (
                step["loss_metrics/global_avg_loss"],
                step["grad_norm"],
                step["moe/global_load_balancing_loss"],
            )
            for step in logged
        ]

    assert numbers(whole[0]) == numbers(first[0]) + numbers(second[0])
    assert numbers(whole[0])[2][2] != numbers(whole[0])[3][2]
    torch.testing.assert_close(
        *(_last_counts(f"{tmp_path}/{name}") for name in ("whole", "stopped")), rtol=0, atol=0
    )


def test_checkpoint_without_the_loss_is_refused_in_one_line(ranks, tmp_path):
    """torchtitan's loader would end in a traceback about a missing key."""
    save = [*JOB[:2], "--training.steps=1", *JOB[5:8], "--checkpoint.interval=1"]
    for name, losses in (("without", "[]"), ("with", JOB[3])):
        model = ["--model.aux_losses", losses]
        ranks.run(1, train, [*save, *model, f"--dump_folder={tmp_path}/{name}"])
    resume = [*JOB[:4], "--checkpoint.enable"]
    for flag in ("--dump_folder={}", "--checkpoint.initial_load_path={}/checkpoint/step-1"):
        job = job_config.load([*resume, flag.format(tmp_path / "without")])
        with pytest.raises(JobError, match="saved without the global-batch loss"):
            checkpoint_has_router_state(job)
        checkpoint_has_router_state(job_config.load([*resume, flag.format(tmp_path / "with")]))


BIAS = [*JOB[:2], *JOB[4:10], "--parallelism.expert_parallel_degree=2", *JOB[10:]]
SIGN, FROZEN = '{type = "sign", speed = 0.01}', '{type = "frozen"}'
RESET = '{type = "frozen", reset = true}'


@pytest.fixture(scope="module")
def learned(ranks, tmp_path_factory):
    """Folder of a run of two steps with the sign rule, and the biases that it learned."""
    folder = tmp_path_factory.mktemp("learned")
    found = ranks.run(2, biases_of_a_run, [*bias_job(folder, SIGN), "--training.steps=2"])[0]
    assert found["loaded"].abs().max() == 0 and found["trained"].abs().max() >= 0.01
    return folder, found["trained"]


def bias_job(folder, rule: str) -> list[str]:
    return [*BIAS, f"--model.expert_bias={rule}", f"--dump_folder={folder}"]


def copied(learned, tmp_path) -> Path:
    return Path(shutil.copytree(learned[0], tmp_path / "run"))


def files_of(folder, rule: str, *flags: str, processes: int = 2) -> None:
    """What the launcher asks before it starts a process."""
    longer = "--training.steps=9"
    validate_files(job_config.load([*bias_job(folder, rule), longer, *flags], processes))


def test_frozen_keeps_the_bits_of_a_learned_bias(ranks, learned, tmp_path):
    folder = copied(learned, tmp_path)
    files_of(folder, FROZEN)
    found = ranks.run(2, biases_of_a_run, bias_job(folder, FROZEN))[0]
    assert torch.equal(found["loaded"], learned[1])
    assert torch.equal(found["trained"], learned[1])
    again = copied(learned, tmp_path / "sign")
    moved = ranks.run(2, biases_of_a_run, bias_job(again, SIGN))[0]
    assert torch.equal(moved["loaded"], learned[1])
    assert not torch.equal(moved["trained"], learned[1])


def test_a_rule_that_remembers_takes_over_from_one_that_does_not(ranks, learned, tmp_path):
    """Two steps of momentum after two of the sign rule, and two more from its own checkpoint."""
    folder = copied(learned, tmp_path)
    momentum = bias_job(folder, '{type = "momentum"}')
    first = ranks.run(2, biases_of_a_run, momentum)[0]
    assert torch.equal(first["loaded"], learned[1])
    assert not torch.equal(first["trained"], learned[1])
    saved = read_metadata(folder / "checkpoint" / "step-4").state_dict_metadata
    assert sum("expert_bias.momentum_E" in name for name in saved) == 3
    longer = ["--training.steps=6", "--lr_scheduler.total_steps=4"]
    again = ranks.run(2, biases_of_a_run, [*momentum, *longer])[0]
    assert torch.equal(again["loaded"], first["trained"])


def test_reset_is_taken_once(ranks, learned, tmp_path):
    """A restart before the next checkpoint resets again, a restart after it does not."""
    folder = copied(learned, tmp_path)
    rule = '{type = "sign", speed = 0.01, reset = true}'
    files_of(folder, rule)
    job = bias_job(folder, rule)
    stopped = [*job, "--training.steps=3", "--checkpoint.load_only"]
    for arguments in (stopped, job):
        found = ranks.run(2, biases_of_a_run, arguments)[0]
        assert found["loaded"].abs().max() == 0
        assert found["trained"].abs().max() >= 0.01
        assert json.loads((folder / "checkpoint" / MARKER).read_text()) == {"step": 2}
    on = ranks.run(2, biases_of_a_run, [*job, "--training.steps=5"])[0]
    assert torch.equal(on["loaded"], found["trained"])
    assert json.loads((folder / "checkpoint" / MARKER).read_text()) == {"step": 2}


def test_reset_of_weights_from_another_run_is_taken_once(ranks, learned, tmp_path):
    initial = f"--checkpoint.initial_load_path={learned[0]}/checkpoint/step-2"
    job = [*bias_job(tmp_path, RESET), initial, "--checkpoint.interval=1"]
    found = ranks.run(2, biases_of_a_run, [*job, "--training.steps=1"])[0]
    assert found["loaded"].abs().max() == 0
    sign = [*bias_job(tmp_path, SIGN), initial, "--training.steps=2"]
    moved = ranks.run(2, biases_of_a_run, sign)[0]["trained"]
    on = ranks.run(2, biases_of_a_run, [*job, "--training.steps=3"])[0]
    assert moved.abs().max() > 0 and torch.equal(on["loaded"], moved)


def test_dropping_or_missing_a_bias_is_one_line(ranks, learned, tmp_path):
    with pytest.raises(JobError) as error:
        files_of(learned[0], "none")
    for text in (
        "step-2 was saved with an expert bias (layers.1.moe.expert_bias_E) and this job has none",
        'expert_bias = {type = "frozen"}',
        '{type = "frozen", reset = true}',
    ):
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    ranks.run(2, train, [*bias_job(tmp_path, "none"), "--training.steps=2"])
    files_of(tmp_path, "none")
    for rule in (SIGN, FROZEN, RESET):
        with pytest.raises(JobError, match='without an expert bias .* has one: .*"none"'):
            files_of(tmp_path, rule)


@pytest.fixture
def two_steps(learned, tmp_path) -> Path:
    """Checkpoint folder with two steps, the second as whole as the first."""
    folder = copied(learned, tmp_path) / "checkpoint"
    shutil.copytree(folder / "step-2", folder / "step-4")
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def one_line(folder: Path, *flags: str) -> str:
    with pytest.raises(JobError) as error:
        files_of(folder.parent, SIGN, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def start_line(folder: Path) -> str:
    return summary._start(
        job_config.load([*bias_job(folder.parent, SIGN), "--training.steps=9"], 2)
    )


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata"])
def test_cut_checkpoint_names_the_last_good_one(two_steps, file):
    files_of(two_steps.parent, SIGN)
    cut(two_steps / "step-4" / file)
    message = one_line(two_steps)
    assert str(two_steps / "step-4" / file) in message and "cut" in message
    remedy = f"the last good step in {two_steps} is 2: set checkpoint.load_step = 2"
    assert remedy in message
    files_of(two_steps.parent, SIGN, "--checkpoint.load_step=2")
    cut(two_steps / "step-2" / "__0_0.distcp")
    assert f"no other step in {two_steps} is whole" in one_line(two_steps)


def test_cut_metadata_names_the_last_good_step_to_a_rule_that_remembers(two_steps):
    """Found by the faults: such a rule reads it before the files are checked."""
    cut(two_steps / "step-4" / ".metadata")
    with pytest.raises(JobError, match="it is cut; .* set checkpoint.load_step = 2"):
        job_config.load(bias_job(two_steps.parent, '{type = "momentum"}'), 2)


def test_metadata_of_another_kind_is_one_line(two_steps):
    """Found by the fuzzing."""
    file = two_steps / "step-4" / ".metadata"
    metadata = read_metadata(file.parent)
    del next(iter(metadata.storage_data.values())).__dict__["length"]
    file.write_bytes(pickle.dumps(metadata))
    assert "step-4/.metadata is damaged (AttributeError)" in one_line(two_steps)


def test_missing_files_of_a_checkpoint(learned, two_steps, tmp_path):
    (two_steps / "step-4" / "__0_0.distcp").unlink()
    message = one_line(two_steps)
    assert "step-4/__0_0.distcp is missing; the last good step" in message
    # Without metadata it was killed during the save: torchtitan goes on from the step before.
    (two_steps / "step-4" / ".metadata").unlink()
    files_of(two_steps.parent, SIGN)
    assert start_line(two_steps) == (
        f"goes on after step 2 of {two_steps}; step 4 is left out: its save was cut short, and it "
        "will be saved again"
    )
    files_of(two_steps.parent, SIGN, "--checkpoint.load_step=2")
    message = one_line(two_steps, "--checkpoint.load_step=4")
    assert "set checkpoint.load_step = 2" in message
    message = one_line(two_steps, "--checkpoint.load_step=7")
    assert f"load_step is 7, and {two_steps} has no such step; it has: 2, 4" in message
    # It would silently begin again where no step has metadata.
    (two_steps / "step-2" / ".metadata").unlink()
    assert "step-4/.metadata is missing" in one_line(two_steps)
    initial = f"--checkpoint.initial_load_path={tmp_path}/other/step-2"
    shutil.copytree(learned[0] / "checkpoint", tmp_path / "other")
    files_of(two_steps.parent, SIGN, initial)


def test_a_run_that_was_killed_in_its_first_save_begins_again(two_steps):
    shutil.rmtree(two_steps / "step-2")
    (two_steps / "step-4" / ".metadata").rename(two_steps / "step-4" / ".metadata.tmp")
    files_of(two_steps.parent, SIGN)
    assert start_line(two_steps).startswith("fresh; step 4 is left out: its save was cut short")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_of_a_weight_is_refused_by_who_loads_it(ranks, two_steps):
    """torch.load does not look at the checksums that torch.save has written."""
    file = two_steps / "step-4" / "__1_0.distcp"
    weights = read_metadata(two_steps / "step-4")
    stored = next(
        found
        for index, found in weights.storage_data.items()
        if found.relative_path == file.name and "w1" in index.fqn
    )
    flip(file, stored.offset + stored.length // 2)
    files_of(two_steps.parent, SIGN)  # its size is right
    job = [*bias_job(two_steps.parent, SIGN), "--training.steps=6"]
    with pytest.raises(RuntimeError) as error:
        ranks.run(2, load_checked, job)
    assert f"{file} is damaged: its bytes {stored.offset:,} to " in str(error.value)
    assert ranks.run(2, load_checked, [*job, "--checkpoint.load_step=2"]) == [2, 2]


def test_metadata_that_does_not_say_where_all_of_a_weight_is_is_refused(two_steps):
    file = two_steps / "step-4" / ".metadata"
    metadata = read_metadata(file.parent)
    entry = metadata.state_dict_metadata["tok_embeddings.weight"]
    first, *rest = entry.chunks
    assert rest, "it is cut in two"
    for chunks in (rest, [first, first], [first, replace(rest[0], offsets=torch.Size([1, 0]))]):
        entry.chunks = chunks
        file.write_bytes(pickle.dumps(metadata))
        message = one_line(two_steps)
        assert "step-4/.metadata is damaged: it does not say where all of tok_emb" in message
        assert "set checkpoint.load_step = 2" in message


def test_steps_that_are_done_and_another_model_are_one_line(two_steps):
    assert "training.steps is 4, and" in one_line(two_steps, "--training.steps=4")
    assert "step-4 has done 4" in one_line(two_steps, "--training.steps=4")
    message = one_line(two_steps, "--config=deepseek_v3_debugmodel")
    assert "step-4 has tok_embeddings.weight of shape" in message
    assert message.endswith("in deepseek_v3 debugmodel: it is of another model or flavor")
    files_of(two_steps.parent, SIGN)


def layout(**degrees: int) -> list[str]:
    """Flags of a layout."""
    degrees = {"data_parallel_shard": 1, "expert_parallel": 1} | degrees
    flags = [f"--parallelism.{name}_degree={degree}" for name, degree in degrees.items()]
    # Flex attention wants whole blocks of a row on every rank.
    return [*flags, *(["--training.seq_len=256"] if "context_parallel" in degrees else [])]


BEGIN_AGAIN = ["--checkpoint.exclude_from_loading", "dataloader"]


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (1, {}),
        (2, {"tensor_parallel": 2}),
        (2, {"context_parallel": 2}),
        (4, {"data_parallel_shard": 4}),
        (4, {"data_parallel_shard": 2, "data_parallel_replicate": 2}),
    ],
    ids=str,
)
def test_another_number_of_data_ranks_is_refused_before_the_start(learned, processes, degrees):
    """``learned`` was saved by two."""
    flags = layout(**degrees)
    with pytest.raises(JobError, match="exclude_from_loading"):
        files_of(learned[0], SIGN, *flags, processes=processes)
    files_of(learned[0], SIGN, *flags, *BEGIN_AGAIN, processes=processes)
    # Weights of another run bring no place in the data.
    initial = f"--checkpoint.initial_load_path={learned[0]}/checkpoint/step-2"
    files_of("/nowhere", SIGN, *flags, initial, processes=processes)
    with pytest.raises(JobError, match="exclude_from_loading"):
        whole = (initial, "--checkpoint.no-initial_load_model_only")
        files_of("/nowhere", SIGN, *flags, *whole, processes=processes)


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (2, {"data_parallel_replicate": 2}),
        (4, {"data_parallel_shard": 2, "pipeline_parallel": 2}),
        (4, {"data_parallel_shard": 2, "tensor_parallel": 2}),
    ],
    ids=str,
)
def test_as_many_data_ranks_in_another_layout_go_on_with_the_same_data(
    ranks, learned, tmp_path, processes, degrees
):
    folder, flags = copied(learned, tmp_path), layout(**degrees)
    files_of(folder, SIGN, *flags, processes=processes)
    longer = "--training.steps=9"
    expected = ranks.run(2, next_inputs, [*bias_job(folder, SIGN), longer])
    found = ranks.run(processes, next_inputs, [*bias_job(folder, SIGN), longer, *flags])
    assert not torch.equal(expected[0], expected[1])
    assert {tuple(one.tolist()) for one in found} == {tuple(one.tolist()) for one in expected}


def test_excluded_data_begin_again_on_another_number_of_ranks(ranks, learned, tmp_path):
    folder, flags = copied(learned, tmp_path), layout()
    job = [*bias_job(folder, SIGN), *flags, "--training.steps=9"]
    fresh = ranks.run(1, next_inputs, [*job, f"--dump_folder={tmp_path}/fresh"])[0]
    assert torch.equal(ranks.run(1, next_inputs, [*job, *BEGIN_AGAIN])[0], fresh)


def test_weights_alone_are_no_state_to_go_on_from(ranks, learned, tmp_path):
    folder = copied(learned, tmp_path)
    job = [*bias_job(folder, SIGN), "--checkpoint.last_save_model_only", "--training.steps=3"]
    ranks.run(2, train, job, first_step=3)
    message = one_line(folder / "checkpoint")
    assert "step-3" in message and "set checkpoint.load_step = 2" in message
    files_of(folder, SIGN, "--checkpoint.load_step=2")
    files_of(tmp_path / "new", SIGN, f"--checkpoint.initial_load_path={folder}/checkpoint/step-3")


def test_cut_weights_of_another_run(two_steps, tmp_path):
    cut(two_steps / "step-4" / "__0_0.distcp")
    flag = f"--checkpoint.initial_load_path={two_steps}/step-4"
    job = job_config.load([*bias_job(tmp_path / "new", SIGN), flag], 2)
    with pytest.raises(JobError, match="step-4/__0_0.distcp is cut: .*initial_load_path"):
        validate_files(job)


def test_remote_checkpoints_are_not_looked_into(tmp_path):
    remote = ("--checkpoint.initial_load_path=gs://bucket/step-2", "--checkpoint.load_step=2")
    for flag in remote:
        files_of("gs://bucket/run", SIGN, flag)
    with pytest.raises(JobError, match="reset = true is noted beside .* local folder"):
        job_config.load([*bias_job(tmp_path, RESET), remote[0]], 2)


def test_hugging_face_weights_of_a_finished_run_are_no_checkpoint(two_steps):
    """torchtitan takes them for the latest step and ends in a traceback."""
    (two_steps / "step-6").mkdir()
    (two_steps / "step-6" / "model.safetensors.index.json").write_text("{}")
    message = one_line(two_steps)
    assert "Hugging Face weights" in message and "set checkpoint.load_step = 4" in message


def test_a_whole_checkpoint_has_no_damage(two_steps):
    assert all(damage(Checkpoint(path=path)) is None for path in steps_in(two_steps).values())


def _last_counts(folder: str) -> torch.Tensor:
    """The counts of the last step, as the checkpoint holds them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(f"{folder}/checkpoint/step-4"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    counts = [value for name, value in sorted(_flat(state).items()) if name.endswith("load_E")]
    assert len(counts) == 3 and all(count.sum() > 0 for count in counts)
    return torch.stack(counts)


def _flat(tree: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
    return flat
