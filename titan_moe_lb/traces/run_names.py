"""Names of several runs: the settings that tell them apart, or else the part of the path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_moe_lb.traces.run_info import RunInfo

_SIZES = {
    "ep": "ep {}",
    "pp": "pp {}",
    "tp": "tp {}",
    "cp": "cp {}",
    "dp_shard": "dp_shard {}",
    "dp_replicate": "dp_replicate {}",
    "schedule": "{}",
    "world_size": "{} ranks",
    "global_batch_size": "batch {}",
    "local_batch_size": "local batch {}",
    "micro_batch_size": "micro-batch {}",
    "seq_len": "seq_len {}",
    "num_experts": "{} experts",
    "top_k": "top {}",
    "placement": "experts {}",
    "version": "version {}",
}
"""Fields of :class:`RunInfo` to the text of a value, the most important first."""


@dataclass(frozen=True, slots=True)
class RunNames:
    """Distinct names of several runs."""

    names: list[str]
    not_named: list[str]
    """Further settings in which the runs differ."""


def run_names(infos: Sequence[RunInfo], files: Sequence[Path]) -> RunNames:
    """Name each run by the fewest settings that tell all of them apart, the most important first.

    A setting that some run does not know names none. Runs with the same settings, or a single run,
    have the names of their folders.

    Args:
        infos: description of each run.
        files: trace of each run; no two are the same file.
    """
    settings = [*_settings(infos), ("folder", _folders(files))]
    kept = [(title, texts) for title, texts in settings if len({*texts}) > 1 or title == "folder"]
    for one in reversed(kept[:]):
        rest = [other for other in kept if other is not one]
        if rest and len({*zip(*(texts for _, texts in rest), strict=True)}) == len(files):
            kept = rest
    titles = {title for title, _ in kept} | {"folder"}
    return RunNames(
        names=[", ".join(texts) for texts in zip(*(texts for _, texts in kept), strict=True)],
        not_named=[
            *dict.fromkeys(t for t, texts in settings if {t} - titles and len({*texts}) > 1)
        ],
    )


def _settings(infos: Sequence[RunInfo]) -> list[tuple[str, list[str]]]:
    """Describe the known settings of all runs, the most important first.

    A title appears twice if a short text may be enough.
    """
    rules = [_bias(info) for info in infos]
    losses, weights = _losses(infos)
    rates, seeds = [info.learning_rate for info in infos], [info.seed for info in infos]
    settings: list[tuple[str, list[str]]] = [
        ("model", [info.title for info in infos]),
        ("losses", losses),
        ("losses", weights),
        ("expert bias", [rule.partition(" (")[0] for rule in rules]),
        ("expert bias", rules),
    ]
    if None not in rates:
        settings.append(("learning rate", [f"lr {rate:g}" for rate in rates]))
    if None not in seeds:
        settings.append(("seed", [f"seed {seed}" for seed in seeds]))
    settings += [
        ("forced routing", [info.forced_routing or "not forced" for info in infos]),
        ("routing", [info.routing or "own routing" for info in infos]),
        ("frozen parts", [_frozen(info) for info in infos]),
        ("score function", [info.score_func or "scores unknown" for info in infos]),
    ]
    for name, text in _SIZES.items():
        values = [getattr(info, name) for info in infos]
        absent = f"no {name.replace('_', ' ')}"
        texts = [absent if value is None else text.format(value) for value in values]
        settings.append((name.replace("_", " "), texts))
    return [*settings, ("MoE layers", [f"{len(info.layers)} MoE layers" for info in infos])]


def _bias(info: RunInfo) -> str:
    return "another framework" if info.is_foreign else info.expert_bias or "no bias"


def _frozen(info: RunInfo) -> str:
    parts = [f"{part} of {len(layers)} layers frozen" for part, layers in info.frozen.items()]
    return " and ".join(parts) or "nothing frozen"


def _losses(infos: Sequence[RunInfo]) -> tuple[list[str], list[str]]:
    """Describe the losses that not all runs have with one weight: without and with weights."""
    common = set.intersection(*({*info.losses.items()} for info in infos))
    own = [{n: w for n, w in info.losses.items() if (n, w) not in common} for info in infos]
    none = f"no {'other' if common else 'aux'} loss"
    names = [" + ".join(map(_short, one)) or none for one in own]
    is_one = len({*names}) == 1 and all(len(one) == 1 for one in own)
    weights = [
        " + ".join(f"{'weight' if is_one else _short(name)} {w:g}" for name, w in one.items())
        or none
        for one in own
    ]
    return names, weights


def _short(name: str) -> str:
    return name.removesuffix("_loss").replace("_", " ")


def _folders(files: Sequence[Path]) -> list[str]:
    """Return the shortest part of each trace's path that no other path has.

    The names of ``exp1/outputs/moe_load.arrow`` and ``exp2/outputs/moe_load.arrow`` are ``exp1``
    and ``exp2``.
    """
    paths = [file.resolve().parts for file in files]
    if len(paths) == 1:
        return [paths[0][-2]]
    while len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return [_shortest(path, [other for other in paths if other != path]) for path in paths]


def _shortest(path: tuple[str, ...], others: list[tuple[str, ...]]) -> str:
    tails = (path[-length:] for length in range(1, len(path) + 1))
    alone = next(tail for tail in tails if all(other[-len(tail) :] != tail for other in others))
    return "/".join(alone)
