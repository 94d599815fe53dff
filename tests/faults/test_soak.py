"""A long run grows by nothing: memory, threads, open files, processes, temporary files.

pytest -m faults tests/faults/test_soak.py --soak-minutes 60
"""

import contextlib
import os
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY

from jdiff import checkpoint

DEVICES = 8
MOST_GROWTH = 50 * 2**20
"""Bytes of resident memory, from a quarter of the time to the end."""


POOL, IDLE = "ts_pool", 20
"""How TensorStore names the threads of its pool, which it starts as work comes and ends when idle for so many seconds, within
the concurrency that Orbax sets (128): their number rises and falls with the saves."""


def thread_names(pid):
    """The name of each thread of a process; one that ends meanwhile is left out."""
    names = []
    for name in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(name.read_text().strip())
    return names


def look(process):
    """Resident bytes, threads, those of TensorStore's pool, open files and children of a process."""
    names = thread_names(process.pid)
    pool = sum(name.startswith(POOL) for name in names)
    with process.oneshot():
        return {
            "memory": process.memory_info().rss,
            "threads": len(names) - pool,
            "pool": pool,
            "files": process.num_fds(),
            "children": len(process.children()),
        }


@pytest.mark.faults
def test_a_soak_leaves_nothing_behind(commands, image_folder, scorer, tmp_path, monkeypatch, request, record_property):
    seconds = 60 * request.config.getoption("soak_minutes")
    temporary, run = tmp_path / "tmp", tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    folder = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", "--config.log.tensorboard=false")
    keys = {"total_steps": 10**8, "checkpoint_every": 100, "sample_every": 100, "eval_every": 200, "log_every": 10}
    keys |= {"eval.network": scorer, "eval.num": 32, "eval.resamples": 2, "data.workers": 2, "keep": 3}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    command = ("launch.py", "--config", "configs/dit_s2.py", "--workdir", run, *TINY, *folder, *flags)
    with (tmp_path / "log").open("w") as log:
        process = commands.start(*command, devices=DEVICES, output=log)
    try:
        while len(checkpoint.steps(run)) < 2:  # compiled, saved, sampled, scored
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        start, seen, watched = time.monotonic(), [], psutil.Process(process.pid)
        while time.monotonic() < start + seconds:
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            seen.append(look(watched))
            time.sleep(max(0.5, seconds / 1000))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, (tmp_path / "log").read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    few = max(1, len(seen) // 20)
    quarter, end = seen[len(seen) // 4 :][:few], seen[-few:]
    middle = lambda part, key: statistics.median(one[key] for one in part)  # noqa: E731
    grown = {key: middle(end, key) - middle(quarter, key) for key in seen[0]}
    steps = checkpoint.steps(run)[-1]
    what = ", ".join(f"{key} {middle(quarter, key):.0f} -> {middle(end, key):.0f}" for key in grown)
    record_property("fault", [f"soak of {seconds / 60:.0f} minutes, {steps} steps", "nothing grows", what])
    assert grown["memory"] < MOST_GROWTH, what
    assert all(grown[key] <= 0 for key in ("threads", "files", "children")), what
    pool = [one["pool"] for one in seen]
    before, after = pool[len(pool) // 4 : len(pool) // 2], pool[-(len(pool) // 4) :]
    fell = min(after) <= max(before) or seconds / 4 < IDLE  # too short to tell
    assert fell, f"TensorStore's pool never fell to what it had held: {max(before)} -> {min(after)}"
    end = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:  # multiprocessing's own ends a moment after its parent
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    left = [
        p for p in (*temporary.rglob("*"), *run.rglob("*")) if p.name.endswith((".partial", ".tmp")) or "tmp-" in p.name
    ]
    assert not left and not [p for p in temporary.rglob("*") if p.is_file()]
