"""A config's own training step compiled ahead of time for a machine that is not there, and what the compiler says of it."""

import dataclasses
import re
import time
from collections import defaultdict
from typing import Any

import jax

from jdiff import config as configs
from jdiff import data, sharding, target, train, tree
from jdiff.plan import arithmetic, topology
from jdiff.plan.program import Program

GPU_SHARE = 0.4
"""Of peak: what a GPU is taken to reach where there is only arithmetic."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """All collectives of one kind over groups of so many devices. bytes: of whole arrays, all runs; see `program.Collective`.
    ideal: the same as the placement of the state asks for, None where it asks for none."""

    kind: str
    group: int
    runs: int
    bytes: int
    ideal: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs and takes. Bytes are of one device; FLOPs of all.

    basis: where the figures come from. state: parameters, average, optimizer, frozen. temporary: activations, gradients and
    scratch. fits: None where the memory is not known. seconds: of the program's estimated cycles, or of the arithmetic; transfers
    are not in it. kernel_cycles: of `cycles`, those of kernels, which have no estimate and are taken at `kernels.SHARE` of peak.
    mfu: model FLOPs over peak in that time. share_estimated: see `Program`; not_estimated: what has none.
    """

    title: str
    topology: str
    basis: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    precision: str
    parameters: int
    trained: int
    state: dict[str, int]
    batch: int
    temporary: int
    total: int
    memory: int
    model_flops: float
    cycles: int | None = None
    kernel_cycles: int | None = None
    seconds: float | None = None
    mfu: float | None = None
    share_estimated: float | None = None
    not_estimated: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds it."""
        return self.total <= self.memory


def plan(config: configs.Config, name: str) -> Plan:
    """The plan of a config on a topology (`topology.parse`). The state and the data set are checked as for training; pictures
    are read for their shape alone.

    ValueError as `train.Setup`'s, and `topology.devices`'.
    """
    where = topology.parse(name)
    config = config.copy_and_resolve_references()
    if config.get("eval_every"):
        config.eval_every = 0  # scoring is not a part of the step
    with target.compiling_for(where.platform):
        setup = train.Setup(config, devices=topology.devices(where))
        batch = batch_shapes(setup)
        known = _known(setup, where, batch)
        if where.platform == "gpu":
            return _by_arithmetic(setup, where, batch, known)
        return _compiled(setup, where, batch, known)


def batch_shapes(setup: train.Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as the reader and its transform make it, of one record's shape; with buckets, of the first one's."""
    reader = data.batches(
        setup.source, batch_size=1, seed=setup.config.seed, flip=False, transform=setup.task.transform
    )
    with reader:
        first = next(reader)
    rows, over = setup.config.batch_size, sharding.batch_sharding(setup.mesh)
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=over) for name, x in first.items()}


def _known(setup: train.Setup, where: topology.Topology, batch: dict[str, Any]) -> dict[str, Any]:
    """What is known before anything is compiled."""
    state, config = setup.abstract, setup.config
    held = {"parameters": state.params, "average": state.ema_params, "optimizer": state.opt_state}
    held["frozen"] = (state.frozen, state.base)
    return {
        "title": setup.task.title,
        "topology": where.name,
        "devices": where.count,
        "mesh": dict(setup.mesh.shape),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "precision": config.precision,
        "parameters": tree.count((state.params, state.frozen, state.base)),
        "trained": tree.count(state.params),
        "state": {key: arithmetic.bytes_a_device(leaves) for key, leaves in held.items()},
        "batch": arithmetic.bytes_a_device(batch),
        "memory": where.chip.memory,
        "model_flops": 6.0 * setup.task.macs() * config.batch_size,
    }


def _compiled(setup: train.Setup, where: topology.Topology, batch: dict[str, Any], known: dict[str, Any]) -> Plan:
    start = time.perf_counter()
    basis = "XLA:TPU's estimate, not a run" if where.platform == "tpu" else "XLA:CPU's buffers; no times"
    lowered = setup.step.lower(setup.abstract, batch)
    held = sum(known["state"].values()) + known["batch"]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _overflow(str(error))
        known |= {"memory": capacity, "temporary": max(used - held, 0), "total": used}
        return Plan(**known, basis=basis, compile_seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    total += stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    plan = Plan(**known, basis=basis, temporary=total - held, total=total, compile_seconds=seconds)
    program = Program(compiled.as_text())
    plan = dataclasses.replace(plan, transfers=transfers(program, arithmetic.ideal(setup)))
    if where.platform == "cpu":
        return plan
    assert where.chip.peak is not None and where.chip.flops_per_cycle is not None
    of_kernels = program.kernel_cycles(where.chip.flops_per_cycle)
    cycles = program.cycles + of_kernels
    return dataclasses.replace(
        plan,
        cycles=cycles,
        kernel_cycles=of_kernels,
        seconds=cycles * where.chip.flops_per_cycle / where.chip.peak,
        mfu=plan.model_flops / where.count / (cycles * where.chip.flops_per_cycle),
        share_estimated=program.share_estimated,
        not_estimated=dict(program.not_estimated),
        unknown_loops=program.unknown_loops,
    )


def _overflow(text: str) -> tuple[int, int]:
    """(bytes used, bytes there are) of XLA:TPU's message; the error itself where it is another."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text)
    if found is None:
        raise ValueError(f"the step does not compile: {' '.join(text.split())[:500]}")
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(found[1]) * units[found[2]]), int(float(found[3]) * units[found[4]])


def _by_arithmetic(setup: train.Setup, where: topology.Topology, batch: dict[str, Any], known: dict[str, Any]) -> Plan:
    """The state as it is placed, its gradient, and what the forward pass keeps for the backward one."""
    gradient = known["state"]["parameters"] * (1 if setup.config.accumulate == 1 else 2)
    temporary = gradient + arithmetic.saved_bytes(setup, batch) // where.count // setup.config.accumulate
    total = sum(known["state"].values()) + known["batch"] + temporary
    assert where.chip.peak is not None
    seconds = known["model_flops"] / (where.count * where.chip.peak * GPU_SHARE)
    basis = f"arithmetic, at {GPU_SHARE:.0%} of peak, without scratch memory"
    moved = [Transfer(*key, 0, 0, size) for key, size in arithmetic.ideal(setup).items()]
    return Plan(**known, basis=basis, temporary=temporary, total=total, seconds=seconds, mfu=GPU_SHARE, transfers=moved)


def transfers(program: Program, ideals: dict[tuple[str, int], int]) -> list[Transfer]:
    """The program's collectives by kind and group, beside the ideal ones."""
    runs: dict[tuple[str, int], int] = defaultdict(int)
    size: dict[tuple[str, int], int] = defaultdict(int)
    for made in program.collectives:
        runs[made.kind, made.group] += made.repeats
        size[made.kind, made.group] += made.repeats * made.bytes
    return [Transfer(*key, runs[key], size[key], ideals.get(key)) for key in sorted({*runs, *ideals})]
