"""Rules of the machine of a job: its devices, programs, data sets, memory and tokenizer."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil

import psutil
import torch

from titan_moe_lb.data.loaders import data_sets, is_text, reads_tokenizer_files
from titan_moe_lb.errors import JobError, nearest
from titan_moe_lb.resolved_job import Job
from titan_moe_lb.telemetry.metrics_processor import LoadBalanceMetricsProcessor

COMPILER_REMEDY = "install one (apt-get install g++), or name it in CXX"


def cpp_compiler() -> str | None:
    """Return the path of the compiler that inductor would start; None if it is missing."""
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return shutil.which(words[0])


def compiler_is_here(job: Job) -> None:
    """Check that a C++ compiler is installed if inductor compiles for the host."""
    on_host = torch.accelerator.current_accelerator(check_available=True) is None
    compiled = job.config.compile.enable and job.config.compile.backend == "inductor"
    if compiled and on_host and cpp_compiler() is None:
        raise JobError(
            f"compile.enable needs a C++ compiler on the host, and none is here: {COMPILER_REMEDY}"
        )


def device_is_here(job: Job) -> None:
    """Refuse settings that need a GPU on a machine without one.

    torch raises these errors too, but only at the start or in the first save.
    """
    if torch.accelerator.is_available():
        return
    if job.config.training.enable_cpu_offload:
        raise JobError(
            "training.enable_cpu_offload needs a GPU, and none is here: leave it out, the "
            "parameters are on the host already"
        )
    checkpoint = job.config.checkpoint
    if checkpoint.enable and getattr(checkpoint, "async_mode", "") == "async_with_pinned_mem":
        raise JobError(
            "checkpoint.async_mode 'async_with_pinned_mem' needs a GPU, and none is here: take "
            "'async' or 'disabled'"
        )


def assets_are_here(job: Job) -> None:
    """Check that ``hf_assets_path`` is a folder with a tokenizer."""
    if not os.path.isdir(job.config.hf_assets_path):
        raise JobError(
            f"hf_assets_path {job.config.hf_assets_path!r} is not a folder: download the model's "
            "tokenizer files there, or name a folder that holds a tokenizer.json"
        )
    files = ("tokenizer.json", "vocab.json", "vocab.txt")
    found = [
        name for name in files if os.path.isfile(os.path.join(job.config.hf_assets_path, name))
    ]
    if reads_tokenizer_files(job.config.tokenizer) and not found:
        raise JobError(
            f"hf_assets_path {job.config.hf_assets_path!r} contains no tokenizer: none of "
            f"{', '.join(files)}"
        )


def datasets_are_known(job: Job) -> None:
    """Check that the data sets of training and validation exist."""
    loaders = {"dataloader": job.config.dataloader}
    if job.config.validator.enable:
        loaders["validator.dataloader"] = job.config.validator.dataloader
    for place, loader in loaders.items():
        if is_text(loader) and loader.dataset not in data_sets():
            raise JobError(
                f"{place}.dataset {loader.dataset!r} does not exist; "
                f"{nearest(loader.dataset, data_sets())}"
            )
        path = getattr(loader, "dataset_path", None)
        if path and path.startswith(("/", ".", "~")) and not os.path.exists(path):
            raise JobError(f"{place}.dataset_path {path}: there is no such file or folder")


def domains_are_known(job: Job) -> None:
    """Check that the data sets of ``validator.domains`` exist and that their load is recorded."""
    domains = getattr(job.config.validator, "domains", [])
    if not job.config.validator.enable or not domains:
        return
    if not is_text(job.config.validator.dataloader):
        raise JobError(
            "validator.domains takes the place of validator.dataloader.dataset, and this loader "
            "has none: leave domains empty"
        )
    for domain in domains:
        if domain not in data_sets():
            raise JobError(
                f"validator.domains {domain!r} does not exist; {nearest(domain, data_sets())}"
            )
    if not isinstance(job.config.metrics, LoadBalanceMetricsProcessor.Config):
        raise JobError(
            "validator.domains needs LoadBalanceMetricsProcessor.Config as the job's metrics: "
            "its sinks are where the load of the domains goes"
        )
    if len(set(domains)) < len(domains):
        raise JobError(f"validator.domains names one dataset twice: {', '.join(domains)}")


def batch_fits_in_memory(job: Job) -> None:
    """Check that the token ids of a local batch fit in memory; the model's need is not known."""
    training = job.config.training
    size = training.local_batch_size * training.seq_len * torch.int64.itemsize
    memory = psutil.virtual_memory().total
    if size > memory:
        raise JobError(
            f"training.local_batch_size {training.local_batch_size:,} x training.seq_len "
            f"{training.seq_len:,} tokens need {size / 2**30:,.0f} GiB for their ids alone, and "
            f"this machine has {memory / 2**30:,.0f} GiB: reduce one of them"
        )


def overrides_are_there(job: Job) -> None:
    """Check that the functions of ``override.imports`` can be imported."""
    for entry in job.config.override.imports:
        target = entry if isinstance(entry, str) else entry[0]
        module, _dot, function = target.rpartition(".")
        try:
            found = hasattr(importlib.import_module(module or function), function)
        except ImportError as error:
            raise JobError(f"override.imports {target}: {error}") from None
        if not found:
            raise JobError(f"override.imports {target}: {module} has no {function!r}")


RULES = (
    compiler_is_here,
    device_is_here,
    assets_are_here,
    datasets_are_known,
    domains_are_known,
    batch_fits_in_memory,
    overrides_are_there,
)
