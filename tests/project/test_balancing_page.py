"""docs/balancing.md: it has every method, and its lines of TOML are those of a job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli

from titan_moe_lb import toml_tables
from titan_moe_lb.balancing.expert_bias import ExpertBias
from titan_moe_lb.balancing.losses import AuxLoss
from titan_moe_lb.errors import JobError
from titan_moe_lb.job import job_config
from titan_moe_lb.wiring.model_spec import BalancedModelSpec

PAGE = (Path(__file__).parents[2] / "docs" / "balancing.md").read_text()
REFUSED = "# refused: "
BLOCKS = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ACCEPTED = [block for block in BLOCKS if not block.startswith(REFUSED)]
START = '[job]\nmodule = "deepseek_v3"\nflavor = "tiny"\n'


def load(block: str, folder: Path) -> BalancedModelSpec:
    path = folder / "my_job.toml"
    path.write_text(START + block)
    spec = job_config.load(["--job-config", str(path)]).config.model_spec
    assert isinstance(spec, BalancedModelSpec)
    return spec


def named(table: dict) -> list[dict]:
    """Losses and bias rules of a [model] table."""
    bias = table.get("expert_bias")
    return [*table.get("aux_losses", []), *([] if bias is None else [bias])]


@pytest.mark.parametrize(
    "block", ACCEPTED, ids=lambda block: re.findall('type = "(\\w+)"', block)[0]
)
def test_every_block_is_the_model_of_a_job(block, tmp_path):
    table = tomli.loads(block)["model"]
    spec = load(block, tmp_path)
    for key, said in table.items():
        taken = spec.arguments[key]
        configs = taken if key == "aux_losses" else [taken]
        for one, config in zip(named({key: said}), configs, strict=True):
            whole = {"type": config._owner.type_name, **toml_tables.dump(config)}
            assert whole | one == whole


def test_refused_block_ends_in_the_line_that_the_page_shows(tmp_path):
    (block,) = set(BLOCKS) - set(ACCEPTED)
    with pytest.raises(JobError) as error:
        load(block, tmp_path)
    assert block.startswith(f"{REFUSED}{error.value}\n")


@pytest.mark.parametrize("family", [AuxLoss, ExpertBias])
def test_every_method_has_a_section_with_a_block(family):
    sections = re.findall(r"^### (.*?)$(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    text = {name: body for head, body in sections for name in re.findall(r"`(\w+)`", head)}
    kinds = family.kinds.items()
    ours = [name for name, kind in kinds if kind.__module__.startswith("titan_moe_lb")]
    assert ours
    for name in ours:
        assert f'type = "{name}"' in text[name], name
        assert "Source: " in text[name] and "ixed point: " in text[name], name
