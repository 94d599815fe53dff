"""Command lines as processes that begin with their imports done: hundreds of starts are needed, and half of one is imports."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT, Commands

SERVER = """
import json, os, runpy, sys
import grain, jax, optax, orbax.checkpoint  # imported, not used: no backend runs before the fork
import jdiff.train, jdiff.convert.quantized, jdiff.convert.export, jdiff.evaluate.kept
for line in iter(sys.stdin.readline, ""):
    script, arguments, log = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        files = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, file in enumerate((files[0], files[1], files[1])):
            os.dup2(file, number)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the scripts that it is told, one after another, each in a fork of itself and a process group of its own."""


class Forked:
    """Starts scripts of the repository in forks of one process; one at a time."""

    def __init__(self, server: subprocess.Popen[str], log: Path):
        self._server, self.log = server, log

    def run(
        self, script: str, *arguments: object, fault: Callable[[int], None] = lambda _: None, timeout: float = 900
    ) -> int:
        """The exit code of a script that `fault`, given its process group, was let loose on; minus the signal that ended it.

        What it said is in `log`. It is killed at `timeout`, in seconds.
        """
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps([str(ROOT / script), [*map(str, arguments)], str(self.log)]) + "\n")
        self._server.stdin.flush()
        group = int(self._server.stdout.readline())
        fault(group)
        end = time.monotonic() + timeout
        while not self._ended():
            if time.monotonic() > end:
                send(group, signal.SIGKILL)
                raise AssertionError(f"{script} {arguments} did not end in {timeout} s: {self.log.read_text()[-2000:]}")
        return int(self._server.stdout.readline())

    def _ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 1.0)[0])


@contextlib.contextmanager
def forked(commands: Commands, log: Path) -> Iterator[Forked]:
    """A `Forked`, ended with its block."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, env=commands.environment(1), start_new_session=True, **pipes
    )
    try:
        yield Forked(server, log)
    finally:
        server.stdin.close()
        server.wait(60)


def send(group: int, signum: int) -> None:
    """A signal to a process group that may have ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)
