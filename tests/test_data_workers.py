"""Worker processes live exactly as long as the main process wants them."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import multiprocessing, signal, sys
from jdiff import data
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    source = data.open_source("imagefolder", path=sys.argv[1], image_size=8)
    with data.batches(source, batch_size=4, seed=0, workers=2) as reader:
        next(reader), next(reader)
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        for line in sys.stdin:
            for _ in range(10):
                next(reader)
            print("read", flush=True)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks processes up in /proc")
def test_workers_outlast_ctrl_c_but_not_their_main_process(commands, image_folder, tmp_path):
    script = tmp_path / "read.py"
    script.write_text(SCRIPT)
    command, pipe = [sys.executable, str(script), str(image_folder)], subprocess.PIPE
    process = subprocess.Popen(
        command, env=commands.environment(1), stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "read\n", process.communicate()
        process.kill()
        end = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, workers)), "a killed run leaves workers behind"
    finally:
        process.kill()
        process.communicate()
