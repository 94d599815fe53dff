"""Machines by name: `v5e:4x4`, `v5p:4x4x4`, `2xv5e:16x16` of two slices, `h100x8`, `cpu:8`.

A TPU's devices come from XLA:TPU, which compiles for them without having them (the extra `tpu`). Of GPUs arithmetic is all that can
be had: their compiler tunes itself on the card.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from jdiff import runtime
from jdiff.meter import PEAK_FLOPS
from jdiff.tree import nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a maker says of one chip. kind: how its `device_kind` begins. memory: bytes. link: bytes a second that it sends to
    others of its pod or server. flops_per_cycle: bf16, of the cycles that XLA:TPU estimates; bandwidth: bytes of its memory that it
    reads in a second; both None where nothing asks."""

    kind: str
    memory: int
    link: float
    flops_per_cycle: int | None = None
    bandwidth: float | None = None

    @property
    def peak(self) -> float | None:
        """Dense bf16 FLOP/s; None of a CPU's."""
        return PEAK_FLOPS.get(self.kind)

    @property
    def bytes_per_cycle(self) -> float:
        """Of its memory; without end where it is not known."""
        if self.bandwidth is None or self.flops_per_cycle is None or self.peak is None:
            return math.inf
        return self.bandwidth * self.flops_per_cycle / self.peak


TPUS = {
    "v4": Chip("TPU v4", 32 * GIB, 300e9, 262_144, 1228e9),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 200e9, 131_072, 819e9),
    "v5p": Chip("TPU v5", 95 * GIB, 600e9, 262_144, 2765e9),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 448e9, 524_288, 1640e9),
}
GPUS = {
    "a100": Chip("NVIDIA A100", 80 * 10**9, 300e9),
    "h100": Chip("NVIDIA H100", 80 * 10**9, 450e9),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 450e9),
}
EXAMPLES = ("v5e:1x1", "v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:4x4", "v4:2x2x2", "2xv5e:16x16", "h100x8", "cpu:1")


@dataclass(frozen=True)
class Topology:
    """So many of one chip. platform: cpu, gpu or tpu. slices: of a TPU, joined by a data center's network."""

    name: str
    platform: str
    chip: Chip
    count: int
    slices: int = 1


def parse(name: str) -> Topology:
    """A machine by its name; nothing is loaded. ValueError for one that is not known, naming those that are."""
    kind, _, shape = name.partition(":")
    gpu = re.fullmatch(r"([a-z]+\d+)x(\d+)", name)
    if gpu and gpu[1] in GPUS and int(gpu[2]) > 0:
        return Topology(name, "gpu", GPUS[gpu[1]], int(gpu[2]))
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        return Topology(name, "cpu", Chip("cpu", _host_memory(), math.inf), int(shape))
    tpu = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", name)
    if tpu and tpu[2] in TPUS:
        slices = int(tpu[1] or 1)
        return Topology(name, "tpu", TPUS[tpu[2]], slices * math.prod(map(int, tpu[3].split("x"))), slices)
    raise ValueError(
        f"topology {name!r} is unknown{nearest(name, EXAMPLES)}: TPUs are {', '.join(TPUS)}, as v5e:4x4, v5p:4x4x4 or "
        f"2xv5e:16x16 of two slices; GPUs {', '.join(GPUS)}, as h100x8; and this machine's processor, as cpu:1"
    )


def prepare(topology: Topology) -> None:
    """Sets this process up to plan for a machine, before JAX is used for anything: on the CPU, with as many devices as are needed
    to stand for others, and without a cache, which could not run what is compiled."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if topology.platform != "tpu":
        jax.config.update("jax_num_cpu_devices", topology.count)
    runtime.quiet()


def devices(topology: Topology) -> list[Any]:
    """Its devices, to make a mesh of: a TPU's can only be compiled for, and a GPU's are stood for by a CPU's.

    ValueError when libtpu is missing, serves another process, or does not know the topology; or when there are too few CPU devices.
    """
    if topology.platform != "tpu":
        found = jax.devices("cpu")
        if len(found) < topology.count:
            raise ValueError(
                f"topology {topology.name!r} needs {topology.count} CPU devices, and this process has {len(found)}: "
                f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={topology.count}"
            )
        return found[: topology.count]
    return _tpu_devices(topology)


def _tpu_devices(topology: Topology) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError(
            f"topology {topology.name!r} needs libtpu, XLA's compiler for TPUs: pip install 'jax-jdiff[tpu]'"
        )
    # libtpu would ask the cloud's metadata server what machine this is, and wait for its answer
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "4",
    }.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = re.sub(r"^\d+x", "", topology.name)
    if topology.count == 1:  # a part of a host's chips is no topology of its own
        name = f"{name.partition(':')[0]}:{'2x2' + 'x1' * _cube(topology)}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices
    except Exception as error:  # of several kinds, by version
        text = " ".join(str(error).split())
        if "lockfile" in text:
            raise ValueError(
                "libtpu serves another process, and one at a time: wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1"
            ) from error
        raise ValueError(f"topology {topology.name!r} is none that XLA:TPU knows: {text[:300]}") from error
    return list(found)[: topology.count]


def _cube(topology: Topology) -> bool:
    return topology.chip in (TPUS["v4"], TPUS["v5p"])


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
