"""How a CPU is split into devices, and keeps its memory."""

import os
import platform

import pytest

from jdiff import runtime


@pytest.mark.parametrize(
    ("cores", "rows", "mesh", "devices"),
    [
        (2, 8, (-1, 1), 2),
        (2, 7, (-1, 1), 1),  # does not divide
        (2, 6, (-1, 1), 1),  # three rows are not worth a device
        (6, 64, (-1, 1), 4),  # the largest divisor, not all cores
        (8, 64, (-1, 1), 8),
        (8, 64, (1, 1), 1),  # as asked for
        (8, 64, (2, 4), 8),
        (2, 64, (2, 4), 1),  # more than the machine has: the mesh's own error says so
        (8, 64, (0, 4), 1),
        (8, 64, (-1, 4), 4),  # data takes what is left, and that is one
        (2, 64, (-1, 4), 1),
    ],
)
def test_a_core_a_device_where_rows_divide(monkeypatch, cores, rows, mesh, devices):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert runtime.cpu_devices(rows, *mesh) == devices


@pytest.mark.parametrize(
    ("mesh", "processes", "devices"),
    [
        ((-1, 1, 1), 2, 1),  # they may stand on one machine
        ((2, 2, 2), 2, 4),
        ((-1, 2, 2), 2, 2),
        ((1, 1, 2), 1, 2),
        ((1, 2, 1), 4, 1),
    ],
)
def test_each_process_has_its_share_of_the_mesh(monkeypatch, mesh, processes, devices):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert runtime.cpu_devices(64, *mesh, processes=processes) == devices


CALLS = """
import resource
from jdiff import runtime, train
runtime.prepare({devices})
import jax, jax.numpy as jnp
from jdiff import sharding
mesh = sharding.make_mesh()
x = jax.device_put(jnp.ones((8, 2**20)), sharding.batch_sharding(mesh))
f = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + 1, c), x, length=8)[1].sum())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(f.lower(x).compile().memory_analysis().temp_size_in_bytes, faults(), min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_programs_scratch_memory_is_kept(commands, devices):
    """The first call takes its memory from the kernel page by page, the next ones have it."""
    done = commands.run("-c", CALLS.format(devices=devices), devices=devices)
    scratch, first, later = map(int, done.stdout.split())
    assert scratch > 128 * 2**20 / devices and first > scratch / 4096 / 2, done.stderr
    assert later < first / 20
