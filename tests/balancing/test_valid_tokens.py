"""The mask from a data loader to the routers, and what does not fit together."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config.override import derive
from torchtitan.tools.logging import logger

from examples.chat_data import write_chats
from tests.parity.gradients import LoaderThatTells
from tests.support.chat_jobs import padding_of, train_chats
from titan_moe_lb.balancing.router import moe_layers_of
from titan_moe_lb.balancing.valid_tokens.loader import with_token_mask
from titan_moe_lb.balancing.valid_tokens.model_input import DOCUMENT_IDS, VALID_TOKENS
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.trace import read_trace
from titan_moe_lb.upstream import cpu

MODEL = [
    "--model.expert_bias={type='quantile'}",
    "--model.aux_losses=[{type='sequence_wise', weight=0.01, over='document'}]",
]
EVERY_PATH = [
    "--model.expert_bias={type='quantile'}",
    "--model.aux_losses=[{type='sequence_wise', weight=0.01, over='document'}, "
    "{type='communication', weight=0.01, num_device_groups=4, devices_per_token=2}, "
    "{type='entropy', weight=0.01}, {type='z_loss', weight=0.01}]",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["pp=2,schedule=Interleaved1F1B,ac=full", "cp=2", "tp=2,ep=2"])
def test_padding_of_chats_is_known_on_every_layout(ranks, chats, layout):
    """Under torchtitan's SPMD type checker, which has to accept what masks and losses do."""
    (expected,) = ranks.run(1, padding_of, chats)
    model = [*EVERY_PATH, "--debug.spmd_typechecking"]
    logged = ranks.run(2, train_chats, chats, layout, model)[0]
    assert len(expected) == len(logged) == 3 and sum(padding for padding, _tokens in expected) > 0
    for step, (padding, tokens) in zip(logged, expected, strict=True):
        assert step["moe/padding_share"] == pytest.approx(padding / tokens, rel=1e-12)
        assert step["moe/seq_load_balancing_loss"] > 0
    columns = {column.name: column for column in read_trace(f"{chats}/run").info.columns}
    assert columns["padding_share"].per == "step"


class Rows(BaseDataLoader):
    """A loader without positions."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config) -> None:
        pass

    def __iter__(self):
        yield {"input": torch.zeros(2, 8, dtype=torch.int64)}, torch.zeros(2, 8)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass


def test_documents_need_positions():
    config = with_token_mask(Rows.Config(), documents=True)
    with pytest.raises(JobError, match='the batches of Rows have no positions.*over = "row"'):
        next(iter(config.build()))


class NumberedRows(Rows):
    """One that numbers the documents itself, and has no positions either."""

    @dataclass(kw_only=True, slots=True)
    class Config(Rows.Config):
        pass

    def __iter__(self):
        for inputs, labels in super().__iter__():
            yield {**inputs, DOCUMENT_IDS: torch.arange(8).expand(2, -1)}, labels


def test_documents_of_a_loader_that_numbers_them_are_its_own():
    inputs, _labels = next(iter(with_token_mask(NumberedRows.Config(), documents=True).build()))
    assert torch.equal(inputs[DOCUMENT_IDS], torch.arange(8).expand(2, -1))


def test_a_loader_with_nothing_to_say_stays_itself():
    config = Rows.Config()
    assert with_token_mask(config, documents=False) is config
    told = with_token_mask(config, documents=True)
    assert with_token_mask(told, documents=True) is told


def bad_masks() -> dict[str, str]:
    """Of a model that was built for masks, what each wrong batch is answered. One rank."""

    config = job_config.load(["--config=deepseek_v3_tiny", *MODEL]).config
    config.dataloader = derive(config.dataloader, LoaderThatTells.Config)
    config.dump_folder, config.metrics.write_moe_trace = "", False
    if cpu.needed():
        cpu.adapt(config)
    trainer = config.build()
    tokens = torch.zeros(8, 128, dtype=torch.int64, device=trainer.device)
    positions = torch.arange(128, device=trainer.device).expand(8, -1)
    masks = {
        "rows": {VALID_TOKENS: torch.ones(4, 128, dtype=torch.bool)},
        "length": {VALID_TOKENS: torch.ones(8, 64, dtype=torch.bool)},
        "dtype": {VALID_TOKENS: torch.ones(8, 128)},
        "documents": {VALID_TOKENS: torch.ones(8, 128, dtype=torch.bool)},
        "numbers": {DOCUMENT_IDS: torch.zeros(8, 128)},
    }
    answers = {}
    for name, told in masks.items():
        told = {key: mask.to(trainer.device) for key, mask in told.items()}
        try:
            trainer.forward_backward_step(
                input_dict={"input": tokens, "positions": positions, **told},
                labels=tokens,
                global_valid_tokens=torch.tensor(1024, device=trainer.device),
            )
        except JobError as error:
            answers[name] = str(error)
    trainer.close()
    return answers


REMEMBERED = ("expert_bias_E", "trend_E", "load_E")


def a_step_without_a_valid_token() -> tuple[
    list[torch.Tensor], list[torch.Tensor], float, list[str]
]:
    """What rules and losses remember before and after it; its loss values; what the log says."""
    config = job_config.load(
        [
            "--config=deepseek_v3_tiny",
            "--model.expert_bias={type='quantile_trend'}",
            "--model.aux_losses=[{type='global_batch', weight=0.01}]",
            "--training.local_batch_size=4",
        ]
    ).config
    config.dataloader = derive(config.dataloader, LoaderThatTells.Config)
    config.metrics.write_moe_trace = False
    if cpu.needed():
        cpu.adapt(config)
    trainer = config.build()
    tokens = torch.randint(2048, (4, 128), device=trainer.device)
    positions = torch.arange(128, device=trainer.device).expand(4, -1)

    def step(valid: bool) -> list[torch.Tensor]:
        mask = torch.full((4, 128), valid, device=trainer.device)
        batch = {"input": tokens, "positions": positions, VALID_TOKENS: mask}
        trainer.step += 1
        trainer.metrics_processor.ntokens_since_last_log += tokens.numel()
        trainer.metrics_processor.data_loading_times.append(0.0)
        trainer.train_step(iter([(batch, tokens)]))
        state = trainer.model_parts[0].state_dict()
        return [v.clone() for k, v in state.items() if k.endswith(REMEMBERED)]

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)  # the pool's ranks are silent
    step(True)
    before = step(True)
    after = step(False)
    logging.disable(logging.WARNING)
    logger.removeHandler(handler)
    losses = moe_layers_of(trainer.model_parts)[0].router.step_record.step_losses_NA
    trainer.close()
    return before, after, float(losses.abs().max()), said


def test_a_step_without_a_valid_token_changes_nothing_and_says_so(ranks):
    ((before, after, loss, said),) = ranks.run(1, a_step_without_a_valid_token)
    assert len(before) == 3 * len(REMEMBERED) and all(table.any() for table in before)
    assert all(torch.equal(*tables) for tables in zip(before, after, strict=True))
    assert loss == 0
    assert sum("step 3 had no valid token" in line for line in said) == 1


def test_a_wrong_mask_is_one_line(ranks):
    (answers,) = ranks.run(1, bad_masks)
    assert answers["rows"].startswith("valid_tokens is bool of shape (4, 128); this batch needs")
    assert "needs bool of shape (8, 128)" in answers["length"]
    assert answers["dtype"].startswith("valid_tokens is float32")
    assert "pass document_ids" in answers["documents"] or "document_ids=" in answers["documents"]
    assert answers["numbers"].startswith("document_ids is float32")
    assert not any("\n" in answer for answer in answers.values())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--model.expert_bias=[{type='sign'}, {type='quantile'}]"],
            "must be one table with a type",
        ),
        (["--model.expert_bias={type='quantile', num_bins=0}"], "num_bins 0"),
        (
            ["--model.aux_losses=[{type='device_level', weight=0.1, num_device_groups=3}]"],
            "num_device_groups 3, which must divide the 8 experts",
        ),
        (["--model.aux_losses=[{type='device_level', weight=0.1}]"], "num_device_groups"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_process(flags, says):
    with pytest.raises(JobError, match=says) as error:
        job_config.load(["--config=deepseek_v3_tiny", *flags])
    assert "\n" not in str(error.value)
