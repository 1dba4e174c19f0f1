"""Order of the experts in each layer of a checkpoint: computed, checked, saved as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe_lb.errors import JobError
from titan_moe_lb.traces.expert_order import coarse_to_fine, contiguous, greedy_in_groups

FILE_NAME = "placement.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ExpertOrder:
    """Order of the experts in every MoE layer."""

    orders: dict[int, np.ndarray]
    """Expert at each position ``(E,)``, int64, by layer number."""
    ep_degree: int
    """Expert-parallel degree that the order balances; the model is the same at any degree."""
    groups: tuple[int, ...]
    """Numbers of equal groups of neighbouring experts that stay together, as 4 and 8."""
    loads: str
    """Description of the loads that the order balances."""
    earlier: ExpertOrder | None = None
    """Order of the checkpoint to which this one was applied."""

    @property
    def title(self) -> str:
        """Short description with a digest of the order."""
        text = json.dumps({number: order.tolist() for number, order in self.orders.items()})
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        return f"placed for EP {self.ep_degree} ({digest})"

    def inverse(self) -> dict[int, np.ndarray]:
        """Return the inverse permutation ``(E,)`` of each layer."""
        return {number: np.argsort(order) for number, order in self.orders.items()}

    def check(self, num_experts: dict[int, int], what: str) -> None:
        """Check that the order fits a model.

        ``num_experts`` is by layer number.
        """
        if self.orders.keys() != num_experts.keys():
            raise JobError(
                f"the placement is of MoE layers {_listed(self.orders)}, and {what} has "
                f"{_listed(num_experts)}"
            )
        for number, order in self.orders.items():
            if len(order) != num_experts[number]:
                raise JobError(
                    f"the placement has {len(order)} experts in layer {number}, and {what} has "
                    f"{num_experts[number]}"
                )
            if not np.array_equal(np.sort(order), np.arange(len(order))):
                raise JobError(
                    f"the placement of layer {number} is no order of its {len(order)} experts: each "
                    "must occur exactly once"
                )
            contiguous(len(order), self.ep_degree)
            for groups in self.groups:
                if len(order) % groups:
                    raise JobError(
                        f"the placement keeps {groups} groups, which do not divide {len(order)} "
                        "experts"
                    )
                members = order[contiguous(len(order), groups)] // (len(order) // groups)
                if (members != members[:, :1]).any():
                    raise JobError(
                        f"the placement splits one of the {groups} expert groups of layer "
                        f"{number}, which would change the routing"
                    )

    def as_json(self) -> dict[str, Any]:
        """Return the contents of a placement file."""
        return {
            "format": _FORMAT,
            "ep_degree": self.ep_degree,
            "groups": list(self.groups),
            "loads": self.loads,
            "orders": {str(number): order.tolist() for number, order in self.orders.items()},
            "earlier": self.earlier.as_json() if self.earlier is not None else None,
        }

    def write(self, file: Path) -> None:
        """Write a placement file."""
        file.write_text(json.dumps(self.as_json()) + "\n")


def from_loads(
    counts_ME: np.ndarray,
    layers: tuple[int, ...],
    ep_degree: int,
    groups: tuple[int, ...],
    loads: str,
) -> ExpertOrder:
    """Compute a greedy order that balances loads.

    ``counts_ME`` are the tokens of each expert of each layer; -1 for an expert that the layer does
    not have.
    """
    orders = {
        number: greedy_in_groups(counts_E[counts_E >= 0], ep_degree, groups, roll=row).reshape(-1)
        for row, (number, counts_E) in enumerate(zip(layers, counts_ME, strict=True))
    }
    return ExpertOrder(orders=orders, ep_degree=ep_degree, groups=groups, loads=loads)


def read(file: Path) -> ExpertOrder:
    """Read a saved order."""
    try:
        return _of_json(json.loads(file.read_text()))
    except JobError:
        raise
    except OSError as error:
        raise JobError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise JobError(
            f"{file} is no placement: it needs ep_degree, groups (a list) and orders (by layer number, "
            "the expert at each position)"
        ) from None


def of_checkpoint(path: Path) -> ExpertOrder | None:
    """Read the order in a checkpoint's folder, else in its run's folder; None without one."""
    for folder in (path, path.parent.parent):
        if (folder / FILE_NAME).is_file():
            return read(folder / FILE_NAME)
    return None


def parse_groups(text: str) -> tuple[int, ...]:
    """Parse ``--groups``, as in ``"4,8"``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise JobError(f"--groups {text} must be whole numbers of at least 1, as in 4 or 4,8")
    return coarse_to_fine(map(int, words))


def _of_json(table: dict[str, Any]) -> ExpertOrder:
    orders = {
        int(number): np.array([int(expert) for expert in order], dtype=np.int64)
        for number, order in table["orders"].items()
    }
    groups = [int(number) for number in table["groups"]]
    if table["ep_degree"] < 1 or not orders or min(groups, default=1) < 1:
        raise ValueError
    earlier = table.get("earlier")
    return ExpertOrder(
        orders=orders,
        ep_degree=int(table["ep_degree"]),
        groups=coarse_to_fine(groups),
        loads=str(table.get("loads", "")),
        earlier=None if earlier is None else _of_json(earlier),
    )


def _listed(numbers: dict[int, Any]) -> str:
    first, *more = sorted(numbers)
    return f"{first}" if not more else f"{first} to {more[-1]} ({len(numbers)})"
