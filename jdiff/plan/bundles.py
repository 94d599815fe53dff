"""How long jdiff's own kernels take, by the schedules that XLA:TPU makes of them.

A compiled program's text has no estimate for a kernel. But libtpu writes down what it made of it, where it is told so before it is
loaded: bundles of instructions, one of which begins each cycle. A kernel's grid runs one such schedule at each step, and says
how many steps it has in its metadata. Arrays that lie in HBM are moved beside that, for the steps before and after.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

LABEL = "final_hlo-static-per-bundle-utilization"
"""Of the file that has a line for each bundle of the schedule as it will run."""


def record(folder: Path) -> None:
    """From now on this process' libtpu writes schedules into a folder. RuntimeError where it is loaded already."""
    maps = Path("/proc/self/maps")  # Linux has it, as it alone has libtpu
    if maps.exists() and "libtpu" in maps.read_text():
        raise RuntimeError("libtpu is loaded already, and reads only then where to write schedules: call this first")
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={LABEL}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def collect(folder: Path) -> dict[str, int]:
    """Instruction -> bundles, of what has been compiled since the last call; the files are gone then."""
    found = {}
    for file in folder.iterdir():
        if made := re.fullmatch(rf"\d+-(.+)-\d+-{LABEL}\.txt", file.name):
            _, rows = file.read_text().split("== UTILIZATION:\n")
            found[made[1]] = len(rows.split("\n")) - rows.endswith("\n")
        file.unlink()
    return found


def cycles(name: str, steps: int, bytes_moved: int, schedules: Mapping[str, int], bytes_per_cycle: float) -> int | None:
    """Of one run of a kernel: those of its steps' bundles, or of moving so many bytes, where that is longer; None where there is no
    schedule of it. Of equal kernels the compiler schedules one, so any of the same name will do: the longest is taken."""
    of_name = [count for other, count in schedules.items() if other.partition(".")[0] == name.partition(".")[0]]
    bundles = schedules.get(name, max(of_name, default=None))
    return None if bundles is None else max(steps * bundles, round(bytes_moved / bytes_per_cycle))
