"""Many processes of one run, as real processes on this machine: the same numbers, one line where one is lost, and what follows."""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, make_pictures, wait_until

from jdiff import checkpoint, command, processes
from jdiff.processes import LOST, difference

LIMIT = 60
"""Seconds within which the others must have ended."""


def numbers(count, limit=200):
    """The options by which `count` processes on this machine find each other, for each of them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = ("--coordinator", f"127.0.0.1:{port}", "--processes", count, "--start-limit", limit)
    return [(*common, "--process", i) for i in range(count)]


def start(commands, count, *arguments, devices=1, script="launch.py", each=None):
    """`count` processes of one command. each: more arguments of one of them, by its number."""
    for i, more in enumerate(numbers(count)):
        STARTED.append(commands.start(script, *arguments, *(each or {}).get(i, ()), *more, devices=devices))
    return STARTED[-count:]


STARTED = []


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """Whatever a test that failed has left running ends with it."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ends(started, seconds=200):
    """(exit code, what was said) of each; all are killed at the end of the time."""
    end, found = time.monotonic() + seconds, []
    try:
        for process in started:
            _, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
            found.append((process.returncode, err))
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return found


def last(text):
    """What a process said at its end."""
    return text.strip().splitlines()[-1]


def records(workdir):
    """The steps' metrics."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def dit(commands, image_folder, workdir, **keys):
    """A small DiT's run, wide enough for fsdp to split its kernels."""
    keys = {
        "model.width": 96,
        "model.heads": 4,
        "data.name": "imagefolder",
        "data.path": image_folder,
        "total_steps": 20,
        "log_every": 1,
        **keys,
    }
    keys = {"checkpoint_every": 10, "sample_every": keys["total_steps"], **keys}
    changes = (f"--config.{key}={value}" for key, value in keys.items())
    return ("--config", "configs/dit_s2.py", "--workdir", workdir, *commands.tiny, *changes)


def stable_diffusion(base, pictures, workdir, **keys):
    """A tiny Stable Diffusion's run; with lora.rank above 0 adapters are trained."""
    keys = {"init_from": base, "data.path": pictures, "total_steps": 20, "log_every": 1, **keys}
    keys = {
        "checkpoint_every": 10,
        "sample_every": 20,
        "batch_size": 8,
        "data.image_size": 16,
        "sample.steps": 2,
        **keys,
    }
    keys |= {
        "data.workers": 0,
        "buckets.use": False,
        "precision": "fp32",
        "log.tensorboard": False,
        "unet.remat": "none",
    }
    return ("--config", "configs/sd15_lora.py", "--workdir", workdir, *(f"--config.{k}={v}" for k, v in keys.items()))


def assert_same_losses(found, expected, count=20):
    """The first three steps to 1e-5, all to 1e-4 relative."""
    a, b = (np.array([record["loss"] for record in each]) for each in (found, expected))
    assert len(a) == len(b) == count
    np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5)
    np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(commands, image_folder, tmp_path_factory):
    """The run of one process on one device that all others must equal."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    result = commands.run("launch.py", *dit(commands, image_folder, workdir))
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.runs
def test_two_processes_train_as_one(commands, image_folder, alone, tmp_path):
    """Through the local launcher, over fsdp and tensor, two devices each."""
    run = dit(commands, image_folder, tmp_path / "run", **{"mesh.fsdp": 2, "mesh.tensor": 2})
    result = commands.run("tools/launch/local.py", "-n", 2, "--", "launch.py", *run, devices=2)
    assert result.returncode == 0, result.stderr
    # Gloo has a line for each new group of devices, which its threads tear: what is all of its words is its
    of_gloo = r"\[\d\]( *(\[Gloo\]|Rank|is|connected|to|peer|ranks\.?|Expected|number|of|:|\d+))*"
    said = [line for line in result.stdout.splitlines() if not re.fullmatch(of_gloo, line.rstrip())]
    assert said == [f"[0] sample grid: {tmp_path}/run/samples/step_00000020.png"]
    assert "4 device(s) as {'data': 1, 'fsdp': 2, 'tensor': 2}" in result.stderr
    assert "[1] DiT" not in result.stderr
    assert_same_losses(records(tmp_path / "run"), records(alone))
    # what the two have written one goes on from, and the other way round
    result = commands.run("launch.py", *dit(commands, image_folder, tmp_path / "run", total_steps=22))
    assert result.returncode == 0 and "resumed from step 20" in result.stderr, result.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 23))


@pytest.mark.runs
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_lost_process_is_named_and_the_run_goes_on(commands, image_folder, tmp_path, victim):
    """Killed, and at the next start stalled."""
    workdir = tmp_path / "run"
    run = dit(commands, image_folder, workdir, total_steps=2000, checkpoint_every=5, sample_every=2000)
    for how in (signal.SIGKILL, signal.SIGSTOP):
        before = max(checkpoint.steps(workdir), default=0)
        started = start(commands, 2, *run, "--lost-after", 5)
        wait_until(lambda: max(checkpoint.steps(workdir), default=0) > before, started[0], 200)  # noqa: B023
        os.kill(started[victim].pid, how)
        since = time.monotonic()
        code, said = ends([started[1 - victim]], LIMIT)[0]
        assert time.monotonic() - since < LIMIT
        os.killpg(started[victim].pid, signal.SIGKILL)
        started[victim].communicate()
        assert code == LOST and last(said).startswith(f"launch.py: process {victim} (") and "is lost" in last(said), (
            said
        )
        assert "Traceback" not in said
        if before:
            assert f"resumed from step {before}" in said or victim == 0, said


@pytest.mark.runs
def test_sigterm_to_one_stops_all_at_one_step(commands, image_folder, tmp_path):
    workdir = tmp_path / "run"
    started = start(commands, 2, *dit(commands, image_folder, workdir, total_steps=2000, checkpoint_every=1000))
    wait_until(lambda: len(records(workdir)) > 3, started[0], 200)
    started[1].terminate()
    found = ends(started)
    assert [code for code, _ in found] == [143, 143], found
    (step,) = checkpoint.steps(workdir)
    assert all(f"stopped by SIGTERM at step {step}" in last(said) for _, said in found), found


def test_processes_that_are_started_otherwise(commands, image_folder, tmp_path):
    run, other = dit(commands, image_folder, tmp_path / "run"), {1: ("--config.optim.lr=0.5",)}
    found = ends(start(commands, 2, *run, each=other), LIMIT)
    for code, said in found:
        assert code == 2 and last(said).startswith("launch.py: process 1 ("), said
        assert "optim.lr is 0.5, not 0.0001" in last(said)
    assert not (tmp_path / "run").exists()


def test_a_missing_process_is_named(commands, image_folder, tmp_path):
    run = dit(commands, image_folder, tmp_path / "run")
    first, second, _ = numbers(3, limit=4)
    for options, said in ((first, "processes 1, 2 are missing"), (second, "process 0 is missing")):
        ((code, text),) = ends([commands.start("launch.py", *run, *options)], LIMIT)
        assert code == LOST and said in last(text) and len(text.strip().splitlines()) == 1, text


@pytest.mark.parametrize("there", [False, True])
def test_what_only_one_process_finds_ends_the_others(commands, image_folder, tmp_path, there):
    """A folder of data that the second machine lacks, or whose listing is another there."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "pictures").symlink_to(image_folder)
    make_pictures(tmp_path / "1" / ("pictures" if there else "others"), each=5)
    run = dit(commands, "pictures", tmp_path / "run")
    run = ("--config", ROOT / "configs" / "dit_s2.py", *run[2:])
    options = enumerate(numbers(2))
    started = [commands.start("launch.py", *run, *more, cwd=tmp_path / str(i)) for i, more in options]
    (first, said), (second, reason) = ends(started, LIMIT)
    if there:
        assert first == second == 2 and "data is" in last(said) and "process 1 (" in last(said), said
    else:
        assert second == 2 and "pictures" in last(reason) and "not exist" in last(reason), reason
        assert first == LOST and "process 1 (" in last(said) and "has failed: " in last(said), said
        assert "not exist" in last(said)
    assert "Traceback" not in said + reason


@pytest.mark.slow
def test_two_processes_sample_as_one_and_go_on_where_they_were_killed(commands, alone, tmp_path):
    def sample(out, *more):
        return (alone, "--num", 48, "--batch-size", 4, "--steps", 3, "--sampler", "ddpm", "--npz", out, *more)

    whole = commands.run("tools/sample.py", *sample(tmp_path / "whole.npz"))
    assert whole.returncode == 0, whole.stderr
    out, script = tmp_path / "two.npz", "tools/sample.py"
    parts = tmp_path / "two.npz.parts"
    started = start(commands, 2, *sample(out), script=script)
    wait_until(lambda: len(list(parts.rglob("*.npy"))) > 1, started[0], 200)
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    there = {path.name: path.stat().st_mtime_ns for path in parts.rglob("*.npy")}
    assert 1 < len(there) < 12 and not out.exists()
    started = start(commands, 2, *sample(out), script=script)
    found = ends(started)
    assert all(code == 0 for code, _ in found), found
    with np.load(tmp_path / "whole.npz") as expected, np.load(out) as got:
        assert got["arr_0"].shape == (48, 8, 8, 3) and (got["labels"] == expected["labels"]).all()
        assert np.abs(got["arr_0"].astype(int) - expected["arr_0"]).max() <= 1
    assert not parts.exists()


SHAPES = (
    *((2, 1, (2, 1, 1)), (2, 1, (1, 2, 1)), (2, 1, (1, 1, 2)), (2, 2, (2, 1, 2)), (2, 2, (1, 2, 2))),
    *((2, 4, (4, 1, 2)), (4, 1, (2, 2, 1)), (4, 2, (2, 2, 2))),
)
"""Processes, devices each, and the mesh over all of them."""


def shaped(mesh):
    """A mesh's keys."""
    return dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))


@pytest.fixture(scope="module")
def families(commands, image_folder, tmp_path_factory):
    """(workdir, keys) -> the command of each family's run."""
    folder = tmp_path_factory.mktemp("families")
    from tiny_sd import make_folder

    base = make_folder(folder)
    pictures = make_pictures(folder / "pictures", ("all",), 16) / "all"
    for path in pictures.glob("*.png"):
        path.with_suffix(".txt").write_text("a red fox")
    sd = partial(stable_diffusion, base, pictures)
    return {
        "dit": partial(dit, commands, image_folder),
        "sd": lambda workdir, **keys: sd(workdir, **{"lora.rank": 0, "accumulate": 1, **keys}),
        "lora": lambda workdir, **keys: sd(workdir, **{"lora.rank": 4, **keys}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "sd", "lora"])
def test_any_processes_and_mesh_train_as_one_device(commands, families, tmp_path, family):
    result = commands.run("launch.py", *families[family](tmp_path / "alone"), timeout=3600)
    assert result.returncode == 0, result.stderr
    for count, devices, mesh in SHAPES:
        workdir = tmp_path / f"{count}-{devices}-{mesh}"
        found = ends(start(commands, count, *families[family](workdir, **shaped(mesh)), devices=devices), 3600)
        assert all(code == 0 for code, _ in found), found
        assert_same_losses(records(workdir), records(tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "sd", "lora"])
def test_a_run_goes_on_over_all_processes_and_meshes(commands, families, tmp_path, family):
    """Each start reads what the last one has written, on another mesh, and no value, record or noise is another."""
    steps = 3 * (len(SHAPES) + 1)
    result = commands.run("launch.py", *families[family](tmp_path / "alone", total_steps=steps), timeout=3600)
    assert result.returncode == 0, result.stderr
    for i, (count, devices, mesh) in enumerate((*SHAPES, (1, 1, (1, 1, 1)))):
        keys = {**shaped(mesh), "total_steps": 3 * (i + 1)}
        run = families[family](tmp_path / "run", **keys)
        if count == 1:
            done = commands.run("launch.py", *run, timeout=3600)
            found = [(done.returncode, done.stderr)]
        else:
            found = ends(start(commands, count, *run, devices=devices), 3600)
        assert all(code == 0 for code, _ in found), found
        assert i == 0 or f"resumed from step {3 * i}" in found[0][1]
    assert_same_losses(records(tmp_path / "run"), records(tmp_path / "alone"), steps)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"accumulate": 2}, {"model.remat": "full"}, {"accumulate": 2, "model.remat": "dots"}])
def test_accumulation_and_recomputing_go_with_processes(commands, image_folder, tmp_path, keys):
    for name, count, devices, mesh in (("alone", 1, 1, (1, 1, 1)), ("many", 2, 2, (1, 2, 2))):
        run = dit(commands, image_folder, tmp_path / name, **keys, **shaped(mesh))
        if count == 1:
            assert commands.run("launch.py", *run).returncode == 0
        else:
            found = ends(start(commands, count, *run, devices=devices))
            assert all(code == 0 for code, _ in found), found
    assert_same_losses(records(tmp_path / "many"), records(tmp_path / "alone"))


@pytest.mark.slow
def test_two_processes_score_as_one(commands, image_folder, scorer, tmp_path):
    scoring = {"eval_every": 2, "eval.network": scorer, "eval.num": 20, "eval.resamples": 3}
    keys = {"total_steps": 4, "checkpoint_every": 2, "sample_every": 4, **scoring, "eval.metrics": "fid,kid"}
    alone = commands.run("launch.py", *dit(commands, image_folder, tmp_path / "alone", **keys))
    assert alone.returncode == 0, alone.stderr
    found = ends(start(commands, 2, *dit(commands, image_folder, tmp_path / "two", **keys), devices=2))
    assert all(code == 0 for code, _ in found), found
    lines = [[json.loads(line) for line in (tmp_path / name / "scores.jsonl").open()] for name in ("alone", "two")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [2, 4]
    for one, two in zip(*lines, strict=True):
        for score in ("fid", "kid"):
            np.testing.assert_allclose(two[score], one[score], rtol=1e-3)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (
            {
                **{
                    "SLURM_JOB_ID": "7",
                    "SLURM_STEP_NODELIST": "node[003-004]",
                    "SLURM_NTASKS": "4",
                    "SLURM_PROCID": "2",
                },
                **{"SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            },
            ("node003:61447", 4, 2, [1]),
        ),
        (
            {
                **{"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "3"},
                **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            },
            ("10.96.0.1", 3, 1, [1]),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script without srun
    ],
    ids=["alone", "slurm", "open-mpi", "sbatch"],
)
def test_processes_ask_their_environment(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    command.add_process_options(parser)
    found = processes.find_numbers(parser.parse_args([]))
    if expected is None:
        assert found is None
    else:
        assert found is not None and found[0].startswith(expected[0]) and found[1:] == expected[1:]


def test_options_that_do_not_go_together():
    parser = argparse.ArgumentParser()
    command.add_process_options(parser)
    for text, said in (
        ("--processes 2", "--coordinator"),
        ("--coordinator a:1 --processes 2 --process 2", "below the count"),
    ):
        with pytest.raises(ValueError, match=said):
            processes.join(parser.parse_args(text.split()))


@pytest.mark.parametrize(
    ("script", "first", "environment", "told", "code"),
    [
        ("slurm.sh", [], {"SLURM_JOB_ID": "7", "CODE": "75"}, ["srun", "scontrol requeue 7"], 75),
        ("slurm.sh", [], {"SLURM_JOB_ID": "7", "CODE": "2"}, ["srun"], 2),
        (
            "tpu_pod.sh",
            ["pod", "zone"],
            {},
            ["git archive", "tpu-vm scp", "tpu-vm ssh pod --zone=zone --worker=all"],
            0,
        ),
        ("xpk.sh", ["run"], {"CLUSTER": "c", "TPU": "v5e-8", "IMAGE": "i"}, ["xpk workload create --cluster=c"], 0),
    ],
)
def test_the_launch_scripts_give_every_argument_on(tmp_path, script, first, environment, told, code):
    """With stand-ins for the clusters' own commands, which write down how they were called."""
    for name in ("srun", "scontrol", "gcloud", "xpk", "git"):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/told\nexit ${{CODE:-0}}\n')
        stand_in.chmod(0o755)
    arguments = ["--config", "configs/dit_s2.py", "--workdir", "runs/two words"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "tools" / "launch" / script, *first, *arguments]
    assert subprocess.run(command, env={**os.environ, **path, **environment}, check=False).returncode == code
    text = (tmp_path / "told").read_text()
    for line in told:
        assert line in text
    assert ("scontrol" in text) == ("scontrol requeue 7" in told)
    (call,) = [line for line in text.splitlines() if "launch.py" in line]
    given = shlex.split(call[call.index("python launch.py") :]) if script != "slurm.sh" else None
    assert given is None or given[2 + given[2:].index("auto") + 1 :] == arguments
    assert given or call.endswith("python launch.py " + " ".join(arguments))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([{"a": 1}, {"a": 1}], None),
        ([{"a": 1}, {"a": 2}], "P1 differs from P0: a is 2, not 1"),
        ([{"a": 1}, {"a": 2}, {"a": 2}], "P0 differs from P1: a is 1, not 2"),
        ([{"a": 1}, {"a": 1}, {"a": 1, "b": None}], None),
        ([{"a": 1, "b": 3}, {"a": 1}], "P1 differs from P0: b is null, not 3"),
        ([{"a": 1}, {"a": 2}, {"a": 1}, {"a": 3}], "P1 (and 1 more) differs from P0: a is 2, not 1"),
    ],
)
def test_the_odd_one_is_named(facts, said):
    line = difference(dict(enumerate(facts)), {i: f"P{i}" for i in range(4)})
    assert line is said is None or (line is not None and line.startswith(f"{said};"))
