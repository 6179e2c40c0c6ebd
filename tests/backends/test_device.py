"""Threads, memory and worlds, on whatever machine the tests run."""

import os
import subprocess
import sys

import pytest
import torch

from peftctl.backends import device

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def clean(monkeypatch):
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_dtypes():
    assert [device.dtype_of(name) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip


def test_threads_follow_the_cores(clean):
    clean.setattr(device, "_usable_cores", lambda: 3)
    device.set_threads()
    assert torch.get_num_threads() == 3


def test_the_users_number_of_threads_stays(clean):
    clean.setattr(device, "_usable_cores", lambda: 3)
    torch.set_num_threads(2)
    clean.setenv("OMP_NUM_THREADS", "1")
    device.set_threads()
    assert torch.get_num_threads() == 2
    clean.setenv("ACCELERATE_MIXED_PRECISION", "no")  # now the launcher may have written the 1
    device.set_threads()
    assert torch.get_num_threads() == 3


@LINUX
@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_bounds_the_cores(clean, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    clean.setattr(device, "_CONTAINER", tmp_path)
    clean.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert device._usable_cores() == cores


@LINUX
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures main memory")
def test_the_peak_starts_anew():
    held = torch.ones(40_000_000)
    high = device.peak_memory_bytes()
    assert high > held.nbytes
    size = held.nbytes
    del held
    device.reset_peak_memory()
    assert device.peak_memory_bytes() < high - size / 2
    assert 0 < device.current_memory_bytes() <= device.peak_memory_bytes()


def test_without_proc_the_peak_is_that_of_the_process(clean, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("measures main memory")
    clean.setattr(device, "_PROCESS", tmp_path / "none")
    clean.setattr(device, "_CLEAR_PEAK", tmp_path / "none" / "either")
    device.reset_peak_memory()
    assert device.peak_memory_bytes() > 50 * 2**20


@LINUX
def test_available_memory(clean, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    4000000 kB\n")
    clean.setattr(device, "_MACHINE", tmp_path / "meminfo")
    clean.setattr(device, "_CONTAINER", tmp_path)
    clean.setattr(device, "current_memory_bytes", lambda: 1000)
    assert device.available_memory_bytes("cpu") == 4_000_000 * 1024 + 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.available_memory_bytes("cpu") == 4_000_000 * 1024 + 1000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert device.available_memory_bytes("cpu") == 2_000_000
    clean.setattr(device, "_MACHINE", tmp_path / "none")
    assert device.available_memory_bytes("cpu") is None
    clean.setattr(torch.cuda, "is_available", lambda: False)
    assert device.available_memory_bytes("cuda") is None


_PRODUCTS = """
import sys
import torch
from peftctl.backends import device

if sys.argv[1] == "bounded":
    device.bound_kernel_caches()
b = torch.ones(256, 256, dtype=torch.bfloat16)
a = torch.ones(1000, 256, dtype=torch.bfloat16)
for rows in range(1, 701):
    a[:rows] @ b
    if rows == 300:
        before = device.current_memory_bytes()
print(device.current_memory_bytes() - before)
"""


@LINUX
def test_compiled_products_are_few(monkeypatch):
    for name in device._KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)

    def growth(how, **more):
        command = [sys.executable, "-c", _PRODUCTS, how]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more}, check=True)
        return int(done.stdout)

    free = growth("free")
    if free < 10 * 2**20:
        pytest.skip("no compiled products on this processor")
    assert growth("bounded") < free / 2
    user = dict.fromkeys(device._KERNEL_CACHES, "1024")
    assert growth("bounded", **user) > 0.7 * free  # the user's word counts
