"""Devices and their links: a table with sources, a file of the user's, or this host."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tomli
from numpy.typing import ArrayLike

from titan_moe_lb.costmodel.all_to_all import all_to_all_time
from titan_moe_lb.costmodel.load import Array
from titan_moe_lb.errors import JobError

HOST = "host"
"""The name that stands for this machine, measured."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and how it reaches the others. SI units; bandwidths in one direction."""

    name: str
    bf16_flops: float
    """FLOP/s of dense BF16 matrix products."""
    memory_bytes: float
    memory_bandwidth: float
    scale_up_domain: int
    """Devices that reach each other over the scale-up links."""
    scale_up_bandwidth: float
    scale_up_latency: float
    scale_out_bandwidth: float
    scale_out_latency: float
    sources: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Where each figure comes from."""

    def __post_init__(self) -> None:
        for figure in FIGURES:
            value = getattr(self, figure)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise JobError(
                    f"hardware {self.name!r}: {figure} is {value!r}; it must be a number above 0"
                )

    def derated(self, *, compute_efficiency: float, network_efficiency: float) -> Hardware:
        """The same device with the share of its peaks that a program reaches."""
        for name, share in (
            ("compute_efficiency", compute_efficiency),
            ("network_efficiency", network_efficiency),
        ):
            if not 0 < share <= 1:
                raise JobError(f"{name} is {share}; it must be above 0 and at most 1")
        return dataclasses.replace(
            self,
            bf16_flops=self.bf16_flops * compute_efficiency,
            scale_up_bandwidth=self.scale_up_bandwidth * network_efficiency,
            scale_out_bandwidth=self.scale_out_bandwidth * network_efficiency,
        )

    def all_to_all_time(
        self, *, num_bytes: ArrayLike, ep_degree: ArrayLike, skew: ArrayLike = 1.0
    ) -> Array:
        """Seconds of an all-to-all among ``ep_degree`` neighbouring ranks.

        Ranks of an EP group are neighbours (torchtitan's innermost mesh axis), so that
        ``min(EP, domain)`` of them share a domain. Of the EP - 1 peers those in the domain
        are reached over the scale-up links, the others over the scale-out ones; both work
        at the same time and the slower one decides.

        Args:
            num_bytes: bytes that a rank receives from all other ranks at balance.
        """
        degree = np.asarray(ep_degree, dtype=np.float64)
        peers = np.maximum(degree - 1, 1)
        near = (np.minimum(degree, self.scale_up_domain) - 1) / peers
        far = np.where(degree > 1, 1 - near, 0.0)
        seconds_per_byte = np.maximum(
            near / self.scale_up_bandwidth, far / self.scale_out_bandwidth
        )
        return all_to_all_time(
            num_bytes=num_bytes,
            ep_degree=degree,
            bandwidth=1 / np.where(degree > 1, seconds_per_byte, 1.0),
            latency=near * self.scale_up_latency + far * self.scale_out_latency,
            skew=skew,
        )


FIGURES = tuple(
    field.name for field in dataclasses.fields(Hardware) if field.name not in ("name", "sources")
)


def hardware(name: str) -> Hardware:
    """The device of that name, of a TOML file of the user's, or this host, measured.

    Raises:
        JobError: neither a known name nor a file; a file that does not define a device.
    """
    if name == HOST:
        from titan_moe_lb.costmodel.host import measure_host

        return measure_host()
    if name.endswith(".toml"):
        return _from_file(name)
    table = known_hardware()
    key = name.lower().replace("-", "_")
    if key not in table:
        from titan_moe_lb.job.toml_tables import nearest

        raise JobError(
            f"--hardware {name!r} is unknown; {nearest(key, [*table, HOST])} To define one, write "
            f"a file such as my.toml with {', '.join(('name', *FIGURES))} and give its path"
        )
    return _device(key, table[key], "hardware.toml")


def known_hardware() -> dict[str, dict[str, Any]]:
    """The table that comes with the package, by name."""
    text = resources.files("titan_moe_lb.costmodel").joinpath("hardware.toml").read_text()
    return tomli.loads(text)


def _from_file(path: str) -> Hardware:
    try:
        table = tomli.loads(Path(path).read_text())
    except FileNotFoundError:
        raise JobError(f"--hardware {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--hardware {path}: cannot be read: {error}") from None
    except tomli.TOMLDecodeError as error:
        raise JobError(f"--hardware {path}: not valid TOML: {error}") from None
    return _device(Path(path).stem, table, path)


def _device(key: str, table: dict[str, Any], place: str) -> Hardware:
    valid = ("name", "sources", *FIGURES)
    for figure in table:
        if figure not in valid:
            from titan_moe_lb.job.toml_tables import nearest

            raise JobError(f"{place}: no figure {figure!r}; {nearest(figure, valid)}")
    missing = [figure for figure in FIGURES if figure not in table]
    if missing:
        raise JobError(f"{place}: {key!r} lacks {', '.join(missing)}")
    return Hardware(**{"name": key, **table})
