"""Several processes of one command on this machine, joined into one run.

    python tools/launch/local.py -n 2 -- launch.py --config configs/dit_s2.py --workdir runs/a
    python tools/launch/local.py -n 2 -- tools/sample.py runs/a --num 50000 --npz samples.npz

Each process's lines carry its number. The exit code is that of the first process that fails, which the others notice and end too.
SIGTERM is handed on to all of them; Ctrl-C reaches them by itself.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO


def main() -> int:
    """Starts, waits, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, required=True, help="processes")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each process: CUDA_VISIBLE_DEVICES=I")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT ARGUMENT", help="what python is to run")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = (*options.command, "--coordinator", f"127.0.0.1:{port}", "--processes", str(options.n))
    processes = []
    for i in range(options.n):
        mine = {"CUDA_VISIBLE_DEVICES": str(i)} if options.gpus else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        command = [sys.executable, *common, "--process", str(i)]
        processes.append(subprocess.Popen(command, env={**os.environ, **mine}, **pipes))
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the processes too
    readers = [
        threading.Thread(target=tell, args=(i, source, sink))
        for i, process in enumerate(processes)
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    code = wait(processes)
    for reader in readers:
        reader.join()
    return code


def tell(number: int, source: IO[str], sink: IO[str]) -> None:
    """A process's lines, its number in front."""
    for line in source:
        sink.write(f"[{number}] {line.rstrip()}\n")
        sink.flush()


def wait(processes: list[subprocess.Popen[str]]) -> int:
    """The exit code of the first process that fails, which ends the others; 0 when all are well."""
    first, lock = [0], threading.Lock()

    def follow(process: subprocess.Popen[str]) -> None:
        code = process.wait()
        with lock:
            if code and not first[0]:
                first[0] = 128 - code if code < 0 else code

    threads = [threading.Thread(target=follow, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return first[0]


if __name__ == "__main__":
    sys.exit(main())
