"""Commands that are killed, stopped or held up at random moments, and started again, end as if nothing had been.

The short set runs always; `pytest -m faults --kills N` disturbs each kind of command N times.
"""

import random
import shutil
import signal
import time
from collections import Counter

import pytest
from cases import CASES, make, not_whole, outcome, stock_in
from forked import forked, send

KINDS = {"kill -9": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,), "SIGSTOP": (signal.SIGSTOP, signal.SIGCONT)}
ENDS = {"kill -9": (-signal.SIGKILL,), "SIGTERM": (-signal.SIGTERM, 143), "SIGSTOP": ()}
"""How a command may end by each; 143 once it has something to save."""


@pytest.fixture(scope="module")
def processes(commands, tmp_path_factory):
    with forked(commands, tmp_path_factory.mktemp("log") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return stock_in(tmp_path_factory.getbasetemp())


WHOLE: dict[str, tuple[dict, float]] = {}
"""What `undisturbed` has found."""


def undisturbed(processes, stock, name):
    """(what the command leaves, seconds that it takes once its programs are compiled)."""

    def run(script, *arguments):
        assert processes.run(script, *arguments) == 0, processes.log.read_text()

    if name not in WHOLE:
        whole, again = make(run, stock, name), stock / f"again {name}"
        start = time.monotonic()
        run(CASES[name].script, *CASES[name].arguments(stock, again))
        WHOLE[name] = whole, time.monotonic() - start
        assert outcome(CASES[name], again) == whole, f"{name} is not the same twice"
        shutil.rmtree(again)
    return WHOLE[name]


def disturb(processes, stock, place, name, count, rng):
    """Disturbs a command `count` times, starting it again each time; the faults by kind. It must end as the undisturbed one."""
    case, (whole, seconds) = CASES[name], undisturbed(processes, stock, name)
    seen: Counter[str] = Counter()

    def finished(code):
        assert code == 0, processes.log.read_text()
        assert outcome(case, place) == whole, f"{name} after {dict(seen)} is not what it should be"
        shutil.rmtree(place)

    while seen.total() < count:
        kind = rng.choices(list(KINDS), (6, 3, 1))[0]
        moment = rng.uniform(0, seconds)

        def fault(group, kind=kind, moment=moment):
            time.sleep(moment)
            for signum in KINDS[kind]:
                send(group, signum)
                time.sleep(0.2 if signum == signal.SIGSTOP else 0)

        code = processes.run(case.script, *case.arguments(stock, place), fault=fault)
        said = f"{name}, {kind} after {moment:.2f} s: code {code}: {processes.log.read_text()[-1500:]}"
        assert code == 0 or code in ENDS[kind], said
        assert "Traceback" not in said, said
        seen[kind] += code != 0 or kind == "SIGSTOP"
        if code == 0:
            finished(code)
        else:
            assert not_whole(case, place, whole) == [], said
            if place.exists() and not case.trains and outcome(case, place) == whole:
                shutil.rmtree(place)  # it was done, and only had not ended yet
    if place.exists():
        finished(processes.run(case.script, *case.arguments(stock, place)))
    return seen


@pytest.mark.runs
def test_disturbed_a_few_times(processes, stock, tmp_path):
    """Of the tools one; runs are killed in tests/test_train.py."""
    disturb(processes, stock, tmp_path / "place", "quantize", 4, random.Random(1))


@pytest.mark.faults
@pytest.mark.parametrize("name", CASES)
def test_disturbed_many_times(processes, stock, tmp_path, name, request, record_property):
    count, seed = request.config.getoption("kills"), request.config.getoption("fault_seed")
    seen = disturb(processes, stock, tmp_path / "place", name, count, random.Random(f"{seed} {name}"))
    said = ", ".join(f"{n} {kind}" for kind, n in sorted(seen.items()))
    record_property("fault", [f"{name}: {seen.total()} faults", "ends as undisturbed", f"all of them ({said})"])
