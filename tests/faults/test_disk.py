"""A disk that is full or broken, and a clock that jumps: what is there is spared, one line says so, and the next start goes on."""

import errno
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from cases import CASES, STEPS, make, not_whole, outcome, stock_in

from jdiff import checkpoint

SOURCE = Path(__file__).parent / "fault.c"
CODES = {"tools/convert.py": 1}
"""Exit codes of commands that could not do it; of others 2."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """fault.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs a C compiler and /proc to let writes fail")
    path = tmp_path_factory.mktemp("fault") / "fault.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def faults(library, monkeypatch):
    """Sets the faults of the commands that are started next; none by no keys."""

    def set_faults(**keys):
        for name in ("LD_PRELOAD", "FAULT_PATH", "FAULT_BYTES", "FAULT_ERRNO", "FAULT_CLOCK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"LD_PRELOAD": library} | keys if keys else {}).items():
            monkeypatch.setenv(name, str(value))

    return set_faults


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_in(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def made(commands, stock):
    """What an undisturbed command leaves, by its case's name."""

    def run(script, *arguments):
        done = commands.run(script, *arguments)
        assert done.returncode == 0, done.stderr

    return partial(make, run, stock)


def said(done, script, code):
    """The last line of a command that failed, which must be its own."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith((f"{Path(script).name}: ", "error: ")), done.stderr
    return line


@pytest.mark.faults
@pytest.mark.parametrize(
    "number", [pytest.param(errno.ENOSPC, marks=pytest.mark.runs), errno.EIO], ids=errno.errorcode.get
)
def test_a_failed_save_is_told_and_spares_the_one_before(
    commands, stock, made, faults, tmp_path, number, record_property
):
    """Orbax writes in the background: its failure ends the run in a line, and the next start ends as an undisturbed run."""
    case, place = CASES["train DiT"], tmp_path / "run"
    whole = made("train DiT")
    one = sum(p.stat().st_size for p in (stock / "train DiT" / "checkpoints" / str(STEPS)).rglob("*") if p.is_file())
    faults(FAULT_PATH="/checkpoints/", FAULT_BYTES=int(1.5 * one), FAULT_ERRNO=number)
    line = said(commands.run(case.script, *case.arguments(stock, place)), case.script, 2)
    assert os.strerror(number) in line and str(place) in line and "make room" in line, line
    (step,) = checkpoint.steps(place)
    assert step == 3 and checkpoint.read_meta(place, step)["step"] == 3
    faults()
    done = commands.run(case.script, *case.arguments(stock, place))
    assert done.returncode == 0 and "resumed from step 3" in done.stderr, done.stderr
    assert outcome(case, place) == whole
    record_property("fault", [f"{errno.errorcode[number]} in a save", "one line, the one before goes on", "so"])


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["train DiT", "sample", "convert", "quantize", "cache", "evaluate"])
def test_a_failed_write_is_one_line(commands, stock, made, faults, tmp_path, name, number, record_property):
    """Nothing that is not whole stands under its own name, and the same command does it once there is room."""
    case, place = CASES[name], tmp_path / "place"
    whole = made(name)
    path = {"train DiT": f"{place}/metrics", "cache": "moments"}.get(name, str(place))
    faults(FAULT_PATH=path, FAULT_BYTES=600, FAULT_ERRNO=number)
    line = said(commands.run(case.script, *case.arguments(stock, place)), case.script, CODES.get(case.script, 2))
    assert os.strerror(number) in line, line
    assert not_whole(case, place, whole) == []
    faults()
    done = commands.run(case.script, *case.arguments(stock, place))
    assert done.returncode == 0, done.stderr
    assert outcome(case, place) == whole
    record_property("fault", [f"{errno.errorcode[number]}: {name}", "one line, nothing half written", line[:60]])


@pytest.mark.faults
def test_a_jumping_clock_changes_nothing(commands, stock, made, faults, tmp_path, record_property):
    case, whole = CASES["train DiT"], made("train DiT")
    faults(FAULT_CLOCK=86_400)
    done = commands.run(case.script, *case.arguments(stock, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert outcome(case, tmp_path / "run") == whole
    record_property("fault", ["a clock that jumps by days", "the same run", "so"])


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(commands, stock, made, tmp_path):
    made("train DiT")
    (tmp_path / "place").mkdir(mode=0o500)
    for name in ("sample", "quantize", "cache"):
        case = CASES[name]
        made(name)
        line = said(commands.run(case.script, *case.arguments(stock, tmp_path / "place")), case.script, 2)
        assert "ermission" in line
