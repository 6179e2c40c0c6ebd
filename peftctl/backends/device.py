"""The device of this process: which one, how many threads, how much memory it has, holds and held at the peak."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Literal

import torch

from peftctl.backends.heap import keep_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_PROCESS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = "128"
"""A pass of a decoder with LoRA has 31 kinds of products; with less room it would compile each anew in every layer."""


def current_device() -> torch.device:
    """Return the accelerator of this process, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def gpu_count() -> int:
    """Return the GPUs of this machine that PyTorch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def dtype_of(name: str) -> torch.dtype:
    """Return the type that a recipe names float32, bfloat16 or float16."""
    return _DTYPES[name]


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """Return bfloat16 where the device has instructions for it, else float32: emulated, it is several times slower."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if platform.machine() in ("x86_64", "AMD64"):
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def set_threads() -> None:
    """Use as many threads as this process may use cores, unless the user has set OMP_NUM_THREADS."""
    # `accelerate launch` and `torchrun` write a 1 there themselves, which would leave cores idle.
    by_launcher = os.environ.get("OMP_NUM_THREADS") == "1" and any(name in os.environ for name in _LAUNCHERS)
    if "OMP_NUM_THREADS" not in os.environ or by_launcher:
        torch.set_num_threads(usable_cores())


def usable_cores() -> int:
    """Return the cores for this process, at least one: launched processes share those of their machine."""
    return max(1, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def reset_peak_memory() -> None:
    """Start a new peak, where the system can: on a GPU, or on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR_PEAK.write_text("5")
    except OSError:  # another system, or a container that forbids it: the peak stays that of the whole process
        return


def peak_memory_bytes() -> int:
    """Return the most memory since `reset_peak_memory`: allocated on the GPU, else resident in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _kibibytes(_PROCESS, "VmHWM") or _peak_of_process()


def current_memory_bytes() -> int:
    """Return the main memory that this process holds now; its peak where the system does not tell."""
    return _kibibytes(_PROCESS, "VmRSS") or _peak_of_process()


def available_memory_bytes(kind: str) -> int | None:
    """Return the memory that this process may have in all; None where this machine has no such device or can't tell.

    Args:
        kind: `cuda`, `mps` or `cpu`.
    """
    if kind == "cuda":
        return torch.cuda.get_device_properties(current_device()).total_memory if torch.cuda.is_available() else None
    free = _kibibytes(_MACHINE, "MemAvailable")
    if free is None:
        return None
    within = _first_word(_CONTAINER / "memory.max")
    of_machine = free + current_memory_bytes()
    return min(of_machine, int(within)) if within.isdigit() else of_machine


def bound_kernel_caches() -> None:
    """Let oneDNN, and PyTorch above it, keep few of the products that they compile, unless the user has set how many.

    Each keeps 1,024, one for all operands of the same shapes. Rows of another length are other shapes: in LoRA steps of
    SmolLM2-135M in bfloat16 each new length added 15 MB, and after 34 lengths 390 MB more than after 9.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, _KERNELS)


def start_process(*, deepspeed: bool = False) -> None:
    """Set this process up for a command: threads, memory that is kept, and no library that it does not use.

    Args:
        deepspeed: Whether it trains through DeepSpeed.
    """
    set_threads()
    keep_memory()
    bound_kernel_caches()
    if not deepspeed:
        leave_deepspeed_out()
    elif not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def leave_deepspeed_out() -> None:
    """Keep accelerate from importing DeepSpeed in a run without it: that takes two seconds and prints log lines.

    accelerate imports it only to ask whether a model is one of its engines.
    """
    from accelerate.utils import other

    other.is_deepspeed_available = lambda: False  # type: ignore[attr-defined]


def _usable_cores() -> int:
    """Return the cores that affinity and a container's quota leave to processes like this one."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _first_word(_CONTAINER / "cpu.max")
    if quota.isdigit():
        period = int((_CONTAINER / "cpu.max").read_text().split()[1])
        cores = min(cores, -(-int(quota) // period))
    return cores


def _kibibytes(file: Path, key: str) -> int | None:
    """Return the bytes of a `key:  123 kB` line; None without such a file or line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _first_word(file: Path) -> str:
    try:
        return file.read_text().split()[0]
    except OSError:
        return ""


def _peak_of_process() -> int:
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
