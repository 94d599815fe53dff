"""How a CPU is split into devices."""

import os

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
