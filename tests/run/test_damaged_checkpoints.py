"""Tests of damaged, missing and foreign checkpoints: one line names the remedy."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.resumed_jobs import (
    LOAD_STEP_2,
    RESET,
    SIGN,
    bias_job,
    files_of,
    refusal,
    resolved,
    start_line,
)
from tests.support.train_jobs import load_checked, train
from titan_moe_lb.checkpoints.resume_point import Checkpoint, damage, read_metadata, steps_in
from titan_moe_lb.errors import JobError


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lengths_lost(file: Path) -> None:
    """Case found by fuzzing."""
    metadata = read_metadata(file.parent)
    del next(iter(metadata.storage_data.values())).__dict__["length"]
    file.write_bytes(pickle.dumps(metadata))


def chunks_lost(change: Callable[[list], list]) -> Callable[[Path], None]:
    """Remove chunks of a weight from the metadata."""

    def damage(file: Path) -> None:
        metadata = read_metadata(file.parent)
        entry = metadata.state_dict_metadata["tok_embeddings.weight"]
        assert len(entry.chunks) == 2
        entry.chunks = change(entry.chunks)
        file.write_bytes(pickle.dumps(metadata))

    return damage


DAMAGES = {
    "file cut": ("__1_0.distcp", cut),
    "file missing": ("__0_0.distcp", Path.unlink),
    "metadata cut": (".metadata", cut),
    "metadata of another kind": (".metadata", lengths_lost),
    "chunk missing": (".metadata", chunks_lost(lambda chunks: chunks[1:])),
    "chunk twice": (".metadata", chunks_lost(lambda chunks: [chunks[0]] * 2)),
    "chunk moved": (
        ".metadata",
        chunks_lost(lambda chunks: [chunks[0], replace(chunks[1], offsets=torch.Size([1, 0]))]),
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_names_the_last_good_one(two_steps, kind):
    name, damage = DAMAGES[kind]
    files_of(two_steps, SIGN)
    damage(two_steps / "checkpoint/step-4" / name)
    message = refusal(two_steps, SIGN)
    assert str(two_steps / "checkpoint/step-4" / name) in message and LOAD_STEP_2 in message
    files_of(two_steps, SIGN, "--checkpoint.load_step=2")
    cut(two_steps / "checkpoint/step-2/__0_0.distcp")
    assert "load_step" not in refusal(two_steps, SIGN)


def test_cut_metadata_names_the_last_good_step_to_a_rule_that_remembers(two_steps):
    """Case found by faults: such a rule reads the metadata before the files are checked."""
    cut(two_steps / "checkpoint/step-4/.metadata")
    with pytest.raises(JobError, match=LOAD_STEP_2):
        resolved(two_steps, '{type = "momentum"}')


def test_a_step_without_metadata_is_left_out(learned, two_steps, tmp_path):
    """The step was killed during its save; torchtitan continues from the earlier step."""
    run, metadata = two_steps, two_steps / "checkpoint/step-4/.metadata"
    metadata.unlink()
    files_of(run, SIGN)
    assert "step 2" in start_line(run) and "step 4 is ignored" in start_line(run)
    files_of(run, SIGN, "--checkpoint.load_step=2")
    assert LOAD_STEP_2 in refusal(run, SIGN, "--checkpoint.load_step=4")
    message = refusal(run, SIGN, "--checkpoint.load_step=7")
    assert "load_step is 7" in message and "2, 4" in message
    # It would silently begin again where no step has metadata.
    (two_steps / "checkpoint/step-2/.metadata").unlink()
    assert str(metadata) in refusal(run, SIGN)
    shutil.copytree(learned[0] / "checkpoint", tmp_path / "other")
    files_of(run, SIGN, f"--checkpoint.initial_load_path={tmp_path}/other/step-2")


def test_a_run_that_was_killed_in_its_first_save_begins_again(two_steps):
    shutil.rmtree(two_steps / "checkpoint/step-2")
    (two_steps / "checkpoint/step-4/.metadata").rename(
        two_steps / "checkpoint/step-4" / ".metadata.tmp"
    )
    files_of(two_steps, SIGN)
    assert start_line(two_steps).startswith("fresh;") and "step 4" in start_line(two_steps)


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_of_a_weight_is_refused_by_who_loads_it(ranks, two_steps):
    """torch.load does not check the checksums that torch.save wrote."""
    file = two_steps / "checkpoint/step-4/__1_0.distcp"
    weights = read_metadata(two_steps / "checkpoint/step-4")
    stored = next(
        found
        for index, found in weights.storage_data.items()
        if found.relative_path == file.name and "w1" in index.fqn
    )
    flip(file, stored.offset + stored.length // 2)
    files_of(two_steps, SIGN)  # its size is right
    job = [*bias_job(two_steps, SIGN), "--training.steps=6"]
    with pytest.raises(RuntimeError) as error:
        ranks.run(2, load_checked, job)
    assert f"{file} is damaged: its bytes {stored.offset:,} to " in str(error.value)
    assert ranks.run(2, load_checked, [*job, "--checkpoint.load_step=2"]) == [2, 2]


def test_steps_that_are_done_and_another_model_are_one_line(two_steps):
    message = refusal(two_steps, SIGN, "--training.steps=4")
    assert "training.steps is 4" in message and "step-4" in message
    message = refusal(two_steps, SIGN, "--config=deepseek_v3_debugmodel")
    assert "step-4" in message and "tok_embeddings.weight" in message and "debugmodel" in message
    files_of(two_steps, SIGN)


def test_weights_alone_are_no_state_to_go_on_from(ranks, run, tmp_path):
    job = [*bias_job(run, SIGN), "--checkpoint.last_save_model_only", "--training.steps=3"]
    ranks.run(2, train, job, first_step=3)
    message = refusal(run, SIGN)
    assert "step-3" in message and LOAD_STEP_2 in message
    files_of(run, SIGN, "--checkpoint.load_step=2")
    files_of(tmp_path / "new", SIGN, f"--checkpoint.initial_load_path={run}/checkpoint/step-3")


def test_cut_weights_of_another_run(two_steps, tmp_path):
    cut(two_steps / "checkpoint/step-4/__0_0.distcp")
    flag = f"--checkpoint.initial_load_path={two_steps}/checkpoint/step-4"
    message = refusal(tmp_path / "new", SIGN, flag)
    assert "step-4/__0_0.distcp" in message and "initial_load_path" in message


def test_remote_checkpoints_are_not_looked_into(tmp_path):
    remote = ("--checkpoint.initial_load_path=gs://bucket/step-2", "--checkpoint.load_step=2")
    for flag in remote:
        files_of("gs://bucket/run", SIGN, flag)
    with pytest.raises(JobError, match="reset"):
        resolved(tmp_path, RESET, remote[0])


def test_hugging_face_weights_of_a_finished_run_are_no_checkpoint(two_steps):
    """torchtitan takes them for the latest step, and fails with a traceback."""
    (two_steps / "checkpoint/step-6").mkdir()
    (two_steps / "checkpoint/step-6/model.safetensors.index.json").write_text("{}")
    message = refusal(two_steps, SIGN)
    assert "Hugging Face" in message and "checkpoint.load_step = 4" in message


def test_a_whole_checkpoint_has_no_damage(two_steps):
    assert all(
        damage(Checkpoint(path=path)) is None
        for path in steps_in(two_steps / "checkpoint").values()
    )
