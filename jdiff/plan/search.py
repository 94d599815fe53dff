"""Which mesh is quickest on a machine, and how large a batch it holds."""

import math

from jdiff import config as configs
from jdiff.plan import topology
from jdiff.plan.training import Plan, plan


def search(config: configs.Config, name: str) -> list[Plan]:
    """Plans of a few meshes, quickest first and those that do not fit last; then the first of them at the largest batch that fits.

    Memory is taken to grow by the same for each row: from two batches to the largest, which is compiled to be sure.
    """
    where = topology.parse(name)
    sizes = sorted({1, 2 ** round(math.log2(where.count) / 2), where.count})
    tried = [plan(_with(config, fsdp=size), name) for size in sizes if where.count % size == 0]
    tried.sort(key=lambda made: (not made.fits, made.seconds or 0.0, made.total))
    best = tried[0]
    unit = config.accumulate * where.count
    fsdp = best.mesh["fsdp"]
    other = plan(_with(config, fsdp=fsdp, batch_size=2 * best.batch_size), name)
    a_row = (other.total - best.total) / best.batch_size
    rows = best.batch_size + (best.memory - best.total) / a_row if a_row > 0 else best.batch_size
    for _ in range(3):
        count = int(rows) // unit * unit
        if count < unit:
            break
        largest = plan(_with(config, fsdp=fsdp, batch_size=count), name)
        if largest.fits:
            return [*tried, largest]
        rows = count * 0.9
    return tried


def _with(config: configs.Config, fsdp: int, batch_size: int | None = None) -> configs.Config:
    config = config.copy_and_resolve_references()
    config.mesh.data, config.mesh.fsdp = -1, fsdp
    config.batch_size = batch_size or config.batch_size
    return config
