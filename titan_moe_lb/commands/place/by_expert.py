"""Rules that find the per-expert tensors of a checkpoint by their names and shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from titan_moe_lb.checkpoints.resume_point import TOKEN_RANKS
from titan_moe_lb.errors import JobError


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ExpertTensors:
    """Names of the per-expert tensors of one MoE layer, of the model or of a copy of it."""

    layer: int
    """Number of the layer in the whole model, as in a trace."""
    num_experts: int
    stacked: list[str] = field(default_factory=list)
    """Tensors with one row for each expert, optimizer state included."""
    separate: list[list[str]] = field(default_factory=list)
    """Lists with one tensor for each expert, in order of the experts."""

    def moves(self, order_E: np.ndarray) -> Iterator[tuple[str, tuple[str, np.ndarray | None]]]:
        """Yield the entries of :data:`Moves` that put the experts in the order ``(E,)``."""
        for name in self.stacked:
            yield name, (name, order_E)
        for names in self.separate:
            yield from ((name, (names[order_E[e]], None)) for e, name in enumerate(names))


_GATE = re.compile(
    r"((?:.*\.)?(\w*layers)\.(\d+)\.(?:\w+\.)*?)(?:router\.gate|gate|router)\.weight"
)
_EXPERTS = re.compile(r"(routed_)?experts\.")
_SEPARATE = re.compile(r"experts\.(\d+)\.(.+)")
_STACKED = re.compile(
    # Gate of torchtitan, then gates of Hugging Face, which hold the bias of DeepSeek-V3 too.
    r"(router\.gate|gate|router)\.(weight|bias|e_score_correction_bias)"
    r"|experts\.\w+"
    # Shape suffix in torchtitan and titan_moe_lb: w1_EFD, mlp1_bias_EG, expert_bias_E.
    r"|(.+\.)?\w+_E[A-Z]*"
)
_STAYS = re.compile(r"shared_expert.*")
_SPEAKS_OF_EXPERTS = re.compile(r"(^|[._])(moe|routers?|experts?)([._]|$)")
_OPTIMIZER_STATE = "optimizer.state."
_OPTIMIZER_SETTINGS = "optimizer.param_groups."


def expert_tensors(tensors: dict[str, Stored], objects: Iterable[str] = ()) -> list[ExpertTensors]:
    """Find all per-expert tensors of each MoE layer, among these tensors and objects.

    Raises:
        JobError: there is no MoE layer, or no rule covers a tensor or object of one.
    """
    model = {
        name: kind
        for name, kind in tensors.items()
        if not name.startswith(_OPTIMIZER_STATE) and name != TOKEN_RANKS
    }
    layers = _layers(model)
    if not layers:
        raise JobError(
            "it has no MoE layer that is known: a gate (router.gate.weight, gate.weight or "
            "router.weight) beside routed experts, in a layer with a number"
        )
    members: dict[str, list[str]] = {prefix: [] for prefix in layers}
    for name in sorted(model):
        prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
        if prefix is not None:
            members[prefix].append(name)
        elif _SPEAKS_OF_EXPERTS.search(name):
            raise JobError(f"{name} names experts but is in no known MoE layer")
    for prefix, names in members.items():
        _enter(layers[prefix], prefix, names, model)
    _enter_optimizer(layers, tensors)
    for name in objects:
        inside = any(prefix in name for prefix in layers)
        if inside and not name.startswith(_OPTIMIZER_SETTINGS):
            raise JobError(f"{name} is of an MoE layer, and is no tensor")
    return list(layers.values())


def _layers(model: dict[str, Stored]) -> dict[str, ExpertTensors]:
    """Find the MoE layers, by the prefix of their tensors' names.

    Layers outside the decoder (multi-token prediction) get the numbers after its last layer, as in
    a trace.
    """
    gates = [gate for name in sorted(model) if (gate := _GATE.fullmatch(name))]
    gates = [
        gate
        for gate in gates
        if any(name.startswith(gate[1]) and _EXPERTS.match(name[len(gate[1]) :]) for name in model)
    ]
    in_decoder = [re.match(r"(?:.*\.)?layers\.(\d+)\.", name) for name in model]
    following = 1 + max((int(match[1]) for match in in_decoder if match), default=-1)
    others = sorted({int(gate[3]) for gate in gates if gate[2] != "layers"})

    def number(gate: re.Match[str]) -> int:
        position = int(gate[3])
        return position if gate[2] == "layers" else following + others.index(position)

    return {
        gate[1]: ExpertTensors(number(gate), num_experts=model[gate[0]].shape[0]) for gate in gates
    }


def _enter(layer: ExpertTensors, prefix: str, names: list[str], model: dict[str, Stored]) -> None:
    """Add the per-expert tensors of one layer; refuse a tensor that no rule covers."""
    separate: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        tail = name.removeprefix(prefix)
        if match := _SEPARATE.fullmatch(tail):
            separate[match[2]][int(match[1])] = name
        elif _STACKED.fullmatch(tail):
            if model[name].shape[:1] != (layer.num_experts,):
                raise JobError(
                    f"{name} has shape {model[name].shape}, and the gate of its layer has "
                    f"{layer.num_experts} experts"
                )
            layer.stacked.append(name)
        elif not _STAYS.fullmatch(tail):
            raise JobError(
                f"{name} is in an MoE layer, but no rule says if it is per expert (names of "
                "per-expert tensors end in their shape, as in _EFD)"
            )
    for rest, of_expert in separate.items():
        if sorted(of_expert) != list(range(layer.num_experts)):
            raise JobError(
                f"{prefix}experts.*.{rest} is there for {len(of_expert)} experts, and the gate has "
                f"{layer.num_experts}"
            )
        if len({model[name] for name in of_expert.values()}) > 1:
            raise JobError(f"{prefix}experts.*.{rest} differs in shape or type between experts")
        layer.separate.append([of_expert[expert] for expert in range(layer.num_experts)])


def _enter_optimizer(layers: dict[str, ExpertTensors], tensors: dict[str, Stored]) -> None:
    """Add the optimizer state of stacked parameters.

    State in the shape of its parameter is per expert. A single number, such as a step count,
    belongs to the whole parameter. Outside of MoE layers, state may have no parameter of its name,
    since a checkpoint may split a fused projection into q, k and v.
    """
    owners = {name: layer for layer in layers.values() for name in layer.stacked}
    for name in sorted(tensors):
        if not name.startswith(_OPTIMIZER_STATE):
            continue
        parameter = name.removeprefix(_OPTIMIZER_STATE).rpartition(".")[0]
        inside = parameter.startswith(tuple(layers)) or _SPEAKS_OF_EXPERTS.search(parameter)
        if inside and parameter not in tensors:
            raise JobError(f"{name} is the state of a parameter that is not there")
        shape = tensors[name].shape
        if parameter in owners and shape not in ((), (1,)):
            if shape != tensors[parameter].shape:
                raise JobError(
                    f"{name} has shape {shape} and its parameter {tensors[parameter].shape}: "
                    "it cannot be split by expert"
                )
            owners[parameter].stacked.append(name)
