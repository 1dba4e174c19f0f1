"""Numbers of a cell, from the files of its run.

Shape suffixes: S = logged steps, D = domains, M = MoE layers, E = experts.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan_moe_lb.traces.balance_statistics import max_violation, normalized_entropy
from titan_moe_lb.traces.domain_trace import DomainTrace, read_domain_trace
from titan_moe_lb.traces.step_windows import tenth
from titan_moe_lb.traces.trace import read_trace


@dataclass(frozen=True, kw_only=True)
class Course:
    """MaxVio and loss of a cell over its logged steps."""

    steps: np.ndarray
    """Numbers of the logged steps, int64 ``(S,)``."""
    violation_S: np.ndarray
    """MaxVio of the global batch, mean over layers."""
    loss_S: np.ndarray
    """Training loss of the language model."""


def measure(folder: Path, balanced_below: float) -> tuple[dict[str, float], Course]:
    """Measure the run in a folder.

    - ``validation_loss``: mean over the domains at the last validation.
    - ``training_loss``: mean over the last tenth of the steps.
    - ``max_violation``: MaxVio of the global batch, mean over layers and over the last quarter of
      the steps; ``micro_batch_max_violation``: of single micro-batches, mean over the same steps.
    - ``steps_until_balanced``: first logged step from which on MaxVio stays below the bound;
      infinite if there is none.
    - ``specialisation``: total variation distance between the loads of two domains, mean over
      layers and pairs of domains. 0: both use the same experts; 1: they share no expert.
    - ``loss_of_DOMAIN``: validation loss of a domain.
    - ``effective_experts_of_DOMAIN``: number of evenly loaded experts with the entropy of the
      domain's load, mean over layers.

    Returns:
        Numbers by name, NaN where the run did not record one; and the course of the run.

    Raises:
        JobError: the folder has no trace.
    """
    trace, domains = read_trace(folder), read_domain_trace(folder)
    violation_S = max_violation(trace.counts_SME).mean(axis=1)
    loss_S = trace.over_steps("loss")
    single_S = trace.over_steps("micro_batch_max_violation")
    late = slice(-max(1, len(trace.steps) // 4), None)
    numbers = {
        "validation_loss": float(domains.loss_VD[-1].mean()) if domains else float("nan"),
        "training_loss": float(loss_S[-tenth(len(loss_S)) :].mean()),
        "max_violation": float(violation_S[late].mean()),
        "micro_batch_max_violation": float(single_S[late].mean()),
        "steps_until_balanced": until_balanced(trace.steps, violation_S, balanced_below),
        "specialisation": float("nan"),
        **(of_domains(domains) if domains else {}),
    }
    return numbers, Course(steps=trace.steps, violation_S=violation_S, loss_S=loss_S)


def until_balanced(steps: np.ndarray, violation_S: np.ndarray, bound: float) -> float:
    """Find the first step from which on MaxVio stays below the bound; infinite if none."""
    above = np.flatnonzero(violation_S >= bound)
    first = above[-1] + 1 if len(above) else 0
    return float(steps[first]) if first < len(steps) else float("inf")


def of_domains(domains: DomainTrace) -> dict[str, float]:
    """Compute the numbers of the last validation that compare domains; see :func:`measure`."""
    counts_DME = domains.counts_VDME[-1]
    share_DME = counts_DME / np.maximum(counts_DME.sum(axis=-1, keepdims=True), 1)
    distances = [
        np.abs(share_DME[a] - share_DME[b]).sum(axis=-1).mean() / 2
        for a, b in itertools.combinations(range(len(domains.domains)), 2)
    ]
    effective_D = (counts_DME.shape[-1] ** normalized_entropy(counts_DME)).mean(axis=-1)
    by_domain = {"loss_of": domains.loss_VD[-1], "effective_experts_of": effective_D}
    return {
        "specialisation": float(np.mean(distances)) if distances else float("nan"),
        **{
            f"{name}_{domain}": float(value)
            for name, values in by_domain.items()
            for domain, value in zip(domains.domains, values, strict=True)
        },
    }
