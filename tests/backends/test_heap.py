"""Where the C library puts tensors."""

import os
import subprocess
import sys

import pytest

from peftctl.backends import heap

_PROBE = """
import ctypes, sys
from peftctl.backends import heap

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena o s h hblkhd us fs u f k".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "spare":
    heap.spare_memory()
libc.free(libc.malloc(8 * 2**20))  # glibc keeps smaller ones in its heap from now on, unless told otherwise
before = libc.mallinfo2().hblkhd
held = libc.malloc(4 * 2**20)
print(libc.mallinfo2().hblkhd - before)
"""


_FAULTS = """
import ctypes, resource, sys
from peftctl.backends import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    heap.keep_memory()

def work():
    blocks = [libc.malloc(30 * 2**20) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, 30 * 2**20)
    for block in blocks:
        libc.free(block)

for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def env(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    return monkeypatch


@pytest.mark.skipif(not heap._glibc(), reason="another C library")
def test_sparing_gives_tensors_pages_of_their_own(env):
    def pages(how, **more):
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, how], capture_output=True, text=True, env={**os.environ, **more}, check=False
        )
        if "mallinfo2" in done.stderr:
            pytest.skip("glibc before 2.33")
        return int(done.stdout)

    assert pages("plain") == 0
    assert pages("spare") >= 4 * 2**20
    assert pages("spare", MALLOC_MMAP_THRESHOLD_=str(16 * 2**20)) == 0  # the user's word counts


def test_the_limit_follows_the_environment(env):
    env.setattr(heap, "_glibc", lambda: True)
    assert (heap.heap_limit(spared=False), heap.heap_limit(spared=True)) == (32 * 2**20, 128 * 1024)
    env.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert heap.heap_limit(spared=False) == heap.heap_limit(spared=True) == 65536
    env.setattr(heap, "_glibc", lambda: False)
    assert heap.heap_limit(spared=False) == 0


@pytest.mark.skipif(not heap._glibc(), reason="another C library")
def test_freed_memory_is_used_again(env):
    def faults(how, **more):
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, env={**os.environ, **more}, check=True
        )
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults("plain") > 10_000
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="65536") > 10_000  # the user's word counts
