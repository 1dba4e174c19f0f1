"""Tests of the token mask, from a data loader to the routers, and of refused combinations."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config.override import derive
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from examples.chat_data import loader_config, write_chats
from tests.parity.gradients import LoaderWithMask
from tests.support.chat_jobs import padding_of, train_chats
from titan_moe_lb.balancing.router import LoadBalancedRouter, moe_layers_of
from titan_moe_lb.balancing.valid_tokens.loader import with_token_mask
from titan_moe_lb.balancing.valid_tokens.model_input import DOCUMENT_IDS, VALID_TOKENS
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.traces.trace import read_trace
from titan_moe_lb.upstream import cpu

QUANTILE = "--model.expert_bias={type='quantile'}"
OF_DOCUMENTS = "{type='sequence_wise', weight=0.01, over='document'}"
OTHERS = (
    "{type='communication', weight=0.01, num_device_groups=4, devices_per_token=2}, "
    "{type='entropy', weight=0.01}, {type='z_loss', weight=0.01}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["pp=2,schedule=Interleaved1F1B,ac=full", "cp=2", "tp=2,ep=2"])
def test_padding_of_chats_is_known_on_every_layout(ranks, chats, layout):
    """torchtitan's SPMD type checker, which is on, accepts the masks and losses."""
    (expected,) = ranks.run(1, padding_of, chats)
    losses = f"--model.aux_losses=[{OF_DOCUMENTS}, {OTHERS}]"
    model = [QUANTILE, losses, "--debug.spmd_typechecking"]
    logged = ranks.run(2, train_chats, chats, layout, model)[0]
    assert len(expected) == len(logged) == 3 and sum(padding for padding, _tokens in expected) > 0
    for step, (padding, tokens) in zip(logged, expected, strict=True):
        assert step["moe/padding_share"] == pytest.approx(padding / tokens, rel=1e-12)
        assert step["moe/seq_load_balancing_loss"] > 0
    columns = {column.name: column for column in read_trace(f"{chats}/run").info.columns}
    assert columns["padding_share"].per == "step"


def test_a_job_that_the_launcher_has_resolved_has_a_mask(chats):
    """The trainer has a copy of the config, which ``build()`` makes."""
    job = job_config.load(["--config=deepseek_v3_tiny"], 1)
    job.config.dataloader = loader_config(chats)
    job.config.metrics = MetricsProcessor.Config()
    job.bind()
    config = replace(job.config)
    config.model_spec.model.update_from_config(config=config)
    routers = [router for _fqn, router, *_ in config.traverse(LoadBalancedRouter.Config)]
    assert routers and all(router.loop.padded and router.loop.track for router in routers)
    assert "padding_share" in {column.name for column in config.metrics.run_info.columns}


class Rows(BaseDataLoader):
    """Loader without positions."""

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
    with pytest.raises(JobError, match="positions.*over"):
        next(iter(config.build()))


class NumberedRows(Rows):
    """Loader that numbers the documents itself, and has no positions either."""

    @dataclass(kw_only=True, slots=True)
    class Config(Rows.Config):
        pass

    def __iter__(self):
        for inputs, labels in super().__iter__():
            yield {**inputs, DOCUMENT_IDS: torch.arange(8).expand(2, -1)}, labels


def test_documents_of_a_loader_that_numbers_them_are_its_own():
    inputs, _labels = next(iter(with_token_mask(NumberedRows.Config(), documents=True).build()))
    assert torch.equal(inputs[DOCUMENT_IDS], torch.arange(8).expand(2, -1))


def test_a_loader_without_a_mask_is_unchanged():
    config = Rows.Config()
    assert with_token_mask(config, documents=False) is config
    masked = with_token_mask(config, documents=True)
    assert with_token_mask(masked, documents=True) is masked


def trainer_of_masks(*flags: str) -> Trainer:
    """Build a trainer for batches of 4 rows of 128 tokens with masks. One rank."""
    arguments = ["--config=deepseek_v3_tiny", "--training.local_batch_size=4", *flags]
    config = job_config.load(arguments).config
    config.dataloader = derive(config.dataloader, LoaderWithMask.Config)
    config.dump_folder, config.metrics.write_moe_trace = "", False
    if cpu.needed():
        cpu.adapt(config)
    return config.build()


def batch(trainer: Trainer, **masks: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    tokens = torch.randint(2048, (4, 128))
    inputs = {"input": tokens, "positions": torch.arange(128).expand(4, -1), **masks}
    return {name: table.to(trainer.device) for name, table in inputs.items()}, tokens.to(
        trainer.device
    )


def answers_to_masks(masks: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Return the refusal of each wrong batch by a model with masks. One rank."""
    trainer = trainer_of_masks(QUANTILE, f"--model.aux_losses=[{OF_DOCUMENTS}]")
    answers = {}
    for name, mask in masks.items():
        inputs, labels = batch(trainer, **mask)
        try:
            trainer.forward_backward_step(
                input_dict=inputs,
                labels=labels,
                global_valid_tokens=torch.tensor(512, device=trainer.device),
            )
        except JobError as error:
            answers[name] = str(error)
    trainer.close()
    return answers


def test_a_wrong_mask_is_refused_with_its_name(ranks):
    valid = torch.ones(4, 128, dtype=torch.bool)
    masks = {
        "rows": {VALID_TOKENS: valid[:2]},
        "length": {VALID_TOKENS: valid[:, :64]},
        "dtype": {VALID_TOKENS: valid.float()},
        "no documents": {VALID_TOKENS: valid},
        "dtype of documents": {DOCUMENT_IDS: torch.zeros(4, 128)},
    }
    (answers,) = ranks.run(1, answers_to_masks, masks)
    assert answers.keys() == masks.keys()
    for name, answer in answers.items():
        assert (DOCUMENT_IDS if "documents" in name else VALID_TOKENS) in answer
        assert "\n" not in answer


REMEMBERED = ("expert_bias_E", "trend_E", "load_E")


def a_step_without_a_valid_token() -> tuple[
    list[torch.Tensor], list[torch.Tensor], float, list[str]
]:
    """Return the state of rules and losses before and after the step, its largest loss value, and
    the log."""
    trainer = trainer_of_masks(
        "--model.expert_bias={type='quantile_trend'}",
        "--model.aux_losses=[{type='global_batch', weight=0.01}]",
    )

    def step(valid: bool) -> list[torch.Tensor]:
        inputs, labels = batch(trainer, **{VALID_TOKENS: torch.full((4, 128), valid)})
        trainer.step += 1
        trainer.metrics_processor.ntokens_since_last_log += labels.numel()
        trainer.metrics_processor.data_loading_times.append(0.0)
        trainer.train_step(iter([(inputs, labels)]))
        state = trainer.model_parts[0].state_dict()
        return [v.clone() for k, v in state.items() if k.endswith(REMEMBERED)]

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)  # the pool's ranks are silent
    step(True)
    before = step(True)
    after = step(False)
    logging.disable(logging.WARNING)
    logger.removeHandler(handler)
    losses = moe_layers_of(trainer.model_parts)[0].router.step_record.step_losses_NA
    trainer.close()
    return before, after, float(losses.abs().max()), lines


def test_a_step_without_a_valid_token_changes_nothing_and_is_logged(ranks):
    ((before, after, loss, lines),) = ranks.run(1, a_step_without_a_valid_token)
    assert len(before) == 3 * len(REMEMBERED) and all(table.any() for table in before)
    assert all(torch.equal(*tables) for tables in zip(before, after, strict=True))
    assert loss == 0
    assert sum("step 3" in line and "valid token" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--model.expert_bias=[{type='sign'}, {type='quantile'}]", "expert_bias"),
        ("--model.expert_bias={type='quantile', num_bins=0}", "num_bins"),
        (
            "--model.aux_losses=[{type='device_level', weight=0.1, num_device_groups=3}]",
            "num_device_groups",
        ),
        ("--model.aux_losses=[{type='device_level', weight=0.1}]", "num_device_groups"),
    ],
)
def test_a_bad_table_is_refused_before_any_process(flag, key):
    with pytest.raises(JobError, match=key) as error:
        job_config.load(["--config=deepseek_v3_tiny", flag])
    assert "\n" not in str(error.value)
