"""The benchmark tells a run that falls behind what is recorded from one that does not."""

import importlib

import pytest
from conftest import ROOT

ZEN, OTHER = {"processor": "2 x Zen"}, {"processor": "8 x other"}


def row(case, ratio, spread=1.0):
    """A case's row, whose sides' medians are so much above their least."""
    times = {"jdiff_ms": 100 * ratio, "jdiff_min_ms": 100 * ratio / spread, "torch_ms": 100.0, "torch_min_ms": 100.0}
    return {"case": case, "ratio": ratio, **times}


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("benchmarks.record")


@pytest.mark.parametrize(
    ("now", "count"),
    [
        (row("a", 1.04), 0),
        (row("a", 1.06), 1),
        (row("a", 1.06, spread=1.1), 0),
        (row("a", 1.2, spread=1.1), 1),
    ],
    ids=["within", "behind", "noisy", "behind the noise"],
)
def test_a_ratio_may_grow_by_the_noise(record, now, count):
    recorded = [ZEN, row("a", 2.0), ZEN, row("a", 1.0), OTHER, row("a", 3.0)]
    lines = record.behind([now, row("unknown", 9.0)], recorded, "2 x Zen")
    assert len(lines) == count and all(line.startswith("a: ") for line in lines)


def test_a_check_of_nothing_is_an_error(record):
    with pytest.raises(LookupError, match="nothing is recorded of a on 8 x other"):
        record.behind([row("a", 1.0)], [ZEN, row("a", 1.0)], "8 x other")
