"""What the tests share: eight virtual devices, commands run as a user runs them, tiny models and pictures."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

QUICK = "--xla_backend_optimization_level=0"  # compiles in a third of the time; the tests' models are small
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"{QUICK} --xla_force_host_platform_device_count=8")

import jax  # noqa: E402  (reads the environment)
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from jdiff import config as configs  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = (
    *("--config.model.depth=2", "--config.model.width=32", "--config.model.heads=2", "--config.data.image_size=8"),
    *("--config.batch_size=8", "--config.sample.steps=2", "--config.sample.count=4", "--config.log.tensorboard=false"),
)
"""Overrides that make any DiT config a model of a second."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the long run of faults takes: `pytest -m faults`."""
    group = parser.getgroup("faults")
    group.addoption("--kills", type=int, default=25, help="random faults to each kind of command")
    group.addoption("--fault-seed", type=int, default=0, help="of their moments")
    group.addoption("--soak-minutes", type=float, default=60, help="how long the soak trains")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of faults: each test's `record_property("fault", [case, expected, seen])`."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()) if r.when == "call"]
    rows = [(*row, r.outcome) for r in reports for name, row in r.user_properties if name == "fault"]
    if rows:
        terminalreporter.section("faults")
        for row in [("case", "expected", "seen", ""), *rows]:
            terminalreporter.write_line(" | ".join(map(str, row)))


@dataclasses.dataclass
class Commands:
    """Runs the project's scripts as processes of their own, with one compilation cache between them."""

    cache: Path
    tiny: tuple[str, ...] = TINY

    def environment(self, devices: int) -> dict[str, str]:
        """The environment of a command that sees `devices` CPU devices."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(
        self, script: str, *arguments: object, devices: int = 1, cwd: Path = ROOT, output: Any = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Starts `script` (a path below the repository, or `-c`) in a process group of its own. output: of both streams."""
        command = [sys.executable, script if script == "-c" else str(ROOT / script), *map(str, arguments)]
        pipes = {"stdout": output, "stderr": output, "text": True}
        return subprocess.Popen(command, cwd=cwd, env=self.environment(devices), start_new_session=True, **pipes)

    def run(self, script: str, *arguments: object, devices: int = 1, cwd: Path = ROOT, timeout: float = 300):
        """Runs `script` to its end; its whole process group is killed at `timeout`."""
        process = self.start(script, *arguments, devices=devices, cwd=cwd)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"{script} {arguments} did not end: {process.communicate()}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Commands:
    """The project's scripts as processes."""
    return Commands(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def xla(tmp_path_factory) -> Path:
    """Where `compiled` keeps programs."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def compiled(xla):
    """Programs of this process compiled once are kept, for the runs that are the same again."""
    options = {"jax_compilation_cache_dir": str(xla)}
    options |= {"jax_persistent_cache_min_compile_time_secs": 0.1, "jax_persistent_cache_min_entry_size_bytes": 0}
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Polls `condition` while `process` runs; AssertionError when the process ends or the time does."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(commands: Commands, *arguments: object, cwd: Path = ROOT) -> Iterator[str]:
    """tools/app.py on a port of its own, ended by Ctrl-C; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = commands.start("tools/app.py", *arguments, "--port", port, cwd=cwd)
    try:
        assert process.stdout.readline().startswith(f"listening on http://127.0.0.1:{port}"), process.stderr.read()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, process.stderr.read()


def make_pictures(folder: Path, classes: Sequence[str] = ("ant", "bee"), each: int = 12) -> Path:
    """Class folders of random pictures, a little larger than the model's and not square."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 pictures of 2 classes."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def scorer(commands, image_folder, tmp_path_factory) -> Path:
    """The run of a classifier of two steps, for `eval.network`: good enough to say whether two scores are the same."""
    workdir = tmp_path_factory.mktemp("scorer") / "run"
    keys = {"data.name": "imagefolder", "data.path": image_folder, "data.split": "all", "data.image_size": 16}
    keys |= {"model.widths": "8,16", "batch_size": 8, "total_steps": 2, "log.tensorboard": False}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    made = commands.run("launch.py", "--config", "configs/classifier_openmoji.py", "--workdir", workdir, *flags)
    assert made.returncode == 0, made.stderr
    return workdir


@pytest.fixture(scope="session")
def class_config(image_folder):
    """Of a DiT of 64 channels on these pictures, two steps; to be copied where it is changed."""
    config = configs.default()
    config.update_from_flattened_dict({
        **{"data.name": "imagefolder", "data.path": str(image_folder), "data.image_size": 8, "batch_size": 8},
        **{"model.depth": 2, "model.width": 64, "model.heads": 2, "total_steps": 2, "log.tensorboard": False},
        **{"sample.steps": 2, "sample.count": 4, "optim.lr": 1e-2, "ema.decay": 0.5},
    })  # fmt: skip
    return config
