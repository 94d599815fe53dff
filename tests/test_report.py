"""A page of one run or several: self-contained, complete, unlike scores apart."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from jdiff.report import read_run, write_page, write_report

CURVES, GRID = 'alt="curves"', "<figure>"


def _run(folder, name, lr, steps=4, scores=()):
    workdir = folder / name
    (workdir / "samples").mkdir(parents=True)
    records = [{"step": s, "loss": lr / s, "loss_quarter_1": 1.0, "steps_per_second": 2.0 * s} for s in range(1, steps)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (workdir / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scores))
    for step in range(1, steps * 4):
        Image.fromarray(np.full((4, 4, 3), step, np.uint8)).save(workdir / "samples" / f"step_{step:08d}.png")
    return read_run(workdir, {"optim.lr": lr, "seed": 0, "<b>": "&"})


def test_one_run_is_a_page_without_a_server(tmp_path):
    run = _run(tmp_path, "a", 0.1)
    page = write_report(tmp_path / "a", run.config).read_text()
    assert page.count(CURVES) == 1 and page.count(GRID) == 12
    assert "step 1<" in page and "step 15<" in page  # the first and the last
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "steps/s" in page and "differs>" not in page


def test_several_runs_stand_side_by_side(tmp_path):
    score = {"samples": "x", "step": 3, "reference": "openmoji", "network": "n", "count": 10, "fid": [1.5, 1.0, 2.0]}
    more = {**score, "step": 9, "fid": [1.25, 1.0, 1.5], "kid": [0.5, 0.25, 0.75]}
    other = {**score, "count": 20, "fid": [0.5, 0.25, 0.75]}
    runs = [_run(tmp_path, "a", 0.1, scores=[score, more]), _run(tmp_path, "b", 0.2, steps=3, scores=[score, other])]
    page = write_page(runs, tmp_path / "page.html").read_text()
    assert page.count(CURVES) == 1 and page.count(GRID) == 12  # six of each
    marked = re.findall(r"<tr class=differs><td>(.*?)</td>", page)
    assert marked == ["optim.lr"]
    tables = page.split("<h2>Scores</h2>")[1:]
    assert len(tables) == 2  # ten pictures do not compare with twenty
    assert tables[0].count("1.5 [1, 2]") == 2 and "1.25 [1, 1.5]</td><td>0.5 [0.25, 0.75]" in tables[0]
    assert "count 20" in tables[1] and "0.5 [0.25, 0.75]" in tables[1]


def test_the_tool_names_what_is_no_run(commands, tmp_path):
    _run(tmp_path, "a", 0.1)
    _run(tmp_path / "other", "a", 0.1)
    done = commands.run("tools/report.py", tmp_path / "a", tmp_path / "other" / "a", "--out", tmp_path / "out.html")
    assert done.returncode == 0 and str(tmp_path / "other" / "a") in (tmp_path / "out.html").read_text(), done.stderr
    (tmp_path / "empty").mkdir()
    for path, said in (("none", "is no folder"), ("empty", "has neither metrics nor samples")):
        done = commands.run("tools/report.py", tmp_path / path, "--out", tmp_path / "no.html")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "no.html").exists()


def test_a_run_without_anything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither metrics nor samples"):
        write_page([read_run(tmp_path, {})], tmp_path / "page.html")
