"""launch.py as its users meet it: one clear line for a mistake, nothing damaged, and a run's folder as promised."""

import json
import os
import resource
import shutil
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_pictures
from PIL import Image

from jdiff import checkpoint

ONE = ("--config.total_steps=4", "--config.checkpoint_every=2", "--config.sample_every=4", "--config.log_every=1")


def refused(commands, *arguments, devices=1, cwd=ROOT) -> str:
    """The one line that a refused command says on stderr; its exit code is 2."""
    result = commands.run("launch.py", *arguments, devices=devices, cwd=cwd)
    assert result.returncode == 2, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("launch.py: ") and result.stdout == "", result.stderr
    return lines[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(commands, image_folder, tmp_path_factory):
    """A finished run of four steps: its folder, its arguments, and how the command ended."""
    workdir = tmp_path_factory.mktemp("launch") / "a"
    keys = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", *commands.tiny, *ONE)
    arguments = ("--config", "configs/dit_s2.py", "--workdir", workdir, *keys, "--config.log.tensorboard=true")
    return workdir, arguments, commands.run("launch.py", *arguments)


def test_a_run_leaves_what_it_promises(run):
    workdir, _, result = run
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"sample grid: {workdir}/samples/step_00000004.png"
    with Image.open(workdir / "samples" / "step_00000004.png") as image:
        image.load()
        assert image.mode == "RGB" and min(image.size) >= 128 and json.loads(image.info["jdiff"])["step"] == 4
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(np.isfinite(r["loss"]) and r["images_per_second"] > 0 and r["grad_norm"] > 0 for r in records)
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "optim.lr" in page
    assert list((workdir / "tensorboard").glob("events*"))
    assert checkpoint.steps(workdir) == [2, 4]
    assert not list(workdir.rglob("*.tmp")) and not (workdir / "bad_images.jsonl").exists()
    assert "100%" in result.stderr and "Traceback" not in result.stderr


def test_a_second_start_of_a_complete_run_ends_at_once(run, commands):
    workdir, arguments, _ = run
    before = {k: v for k, v in files_of(workdir).items() if k.startswith(("checkpoints", "metrics", "samples"))}
    start = time.monotonic()
    result = commands.run("launch.py", *arguments)
    assert result.returncode == 0 and "resumed from step 4" in result.stderr
    assert result.stdout.strip().endswith("step_00000004.png") and time.monotonic() - start < 30
    assert {k: v for k, v in files_of(workdir).items() if k in before} == before


def test_another_models_workdir_is_refused_and_untouched(run, commands):
    workdir, arguments, _ = run
    before = files_of(workdir)
    line = refused(commands, *arguments, "--config.model.width=48")
    assert "another model" in line and "width 32 -> 48" in line and str(workdir) in line
    assert files_of(workdir) == before


def test_how_a_model_is_run_may_change_between_starts(run, commands, tmp_path):
    """Recomputing less or more in the backward pass is the same model: its checkpoint is continued."""
    workdir = shutil.copytree(run[0], tmp_path / "a")
    arguments = [workdir if a == run[0] else a for a in run[1]]
    result = commands.run("launch.py", *arguments, "--config.model.remat=full")
    assert result.returncode == 0 and "model.remat was None, is full" in result.stderr, result.stderr


def test_a_damaged_checkpoint_falls_back_and_says_so(run, commands, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "a")
    arguments = [workdir if a == run[0] else a for a in run[1]]
    data = max((workdir / "checkpoints" / "4" / "params").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    result = commands.run("launch.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "checkpoints/4 is damaged" in result.stderr and "resumed from step 2" in result.stderr
    assert (workdir / "damaged" / "4").is_dir() and checkpoint.steps(workdir) == [2, 4]
    sums = [checkpoint.read_meta(w, 4)["checksums"] for w in (workdir, run[0])]
    assert sums[0] == sums[1]  # trained again, to the same bits


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--config.bach_size=8"], ["bach_size", "batch_size"]),
        (["--config.optim.lr=quick"], ["optim.lr", "float", "quick"]),
        (["--config.precision=fp16"], ["precision", "fp32", "bf16"]),
        (["--config.model.name=DiT-S/3"], ["DiT-S/3", "DiT-S/2"]),
        (["--config.model.heads=5"], ["width=32", "heads=5"]),
        (["--config.model.remat=some"], ["remat='some'"]),
        (["--config.diffusion.zero_terminal_snr=true"], ["diffusion.prediction_type='eps'", "'v'"]),
        (["--config.sample.steps=1001"], ["sample.steps=1001", "1000"]),
        (["--config.model.label_dropout=0"], ["sample.guidance=4.0", "--config.sample.guidance=1"]),
        (["--config.total_steps"], ["--config.total_steps has no value"]),
        (["--batch_size=8"], ["--batch_size=8", "--config.KEY=VALUE"]),
        (["--config.data.name=imagefolder"], ["data.path is missing"]),
        (["--config.data.name=imagefolder", "--config.data.path=nowhere"], ["data.path='nowhere'", "not exist"]),
        (["--config.data.name=latents", "--config.data.path=nowhere"], ["nowhere", "cache_latents"]),
        (["--config.mesh.data=3"], ["mesh.data=3", "1 device"]),
        (["--config.batch_size=9", "--config.accumulate=2"], ["batch_size=9", "8 and 10"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(commands, tmp_path, extra, said):
    arguments = ("--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *commands.tiny)
    line = refused(commands, *arguments, *extra)
    assert all(word in line for word in said), line
    assert not (tmp_path / "w").exists()


def test_devices_that_do_not_divide_the_batch(commands, image_folder, tmp_path):
    arguments = ("--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *commands.tiny)
    arguments += ("--config.data.name=imagefolder", f"--config.data.path={image_folder}")
    assert "8 and 16" in refused(commands, *arguments, "--config.batch_size=12", devices=8)
    line = refused(commands, *arguments, "--config.mesh.fsdp=3", devices=8)
    assert "does not cover 8" in line and "4 x 2 x 1" in line
    line = refused(commands, *arguments, "--config.mesh.tensor=8", "--config.model.width=36", devices=8)
    assert "mesh.tensor=8 does not divide params/dit/" in line and "the nearest that do are 6 and 9" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config FILE is missing"),
        (["--config", "configs/dit_s3.py"], "configs/dit_s2.py"),
        (["--config", "README"], "no such file"),
    ],
)
def test_a_config_that_is_not_there(commands, arguments, said):
    assert said in refused(commands, *arguments)


def test_an_empty_folder_of_pictures(commands, tmp_path):
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    keys = ("--config.data.name=imagefolder", f"--config.data.path={tmp_path / 'pictures'}", *commands.tiny)
    line = refused(commands, "--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *keys)
    assert "holds no pictures" in line and not (tmp_path / "w").exists()


def test_a_workdir_that_is_a_file(commands, image_folder, tmp_path):
    (tmp_path / "w").write_text("mine")
    keys = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", *commands.tiny, *ONE)
    line = refused(commands, "--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *keys)
    assert str(tmp_path / "w") in line and (tmp_path / "w").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_cannot_be_written(commands, image_folder, tmp_path):
    tmp_path.chmod(0o500)
    keys = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", *commands.tiny, *ONE)
    assert str(tmp_path) in refused(commands, "--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *keys)


@pytest.mark.runs
def test_a_run_without_workdir_gets_the_next_number(commands, image_folder, tmp_path):
    keys = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", *commands.tiny, *ONE)
    for number in ("001", "002"):
        result = commands.run("launch.py", "--config", ROOT / "configs" / "dit_s2.py", *keys, cwd=tmp_path)
        assert result.stdout.strip() == f"sample grid: runs/{number}-dit_s2/samples/step_00000004.png", result.stderr


def write_bad_pictures(folder: Path) -> set[str]:
    """Pictures that cannot be read, and odd ones that can, among the good; returns the names of the first."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    picture.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (20, 20)).astype(np.uint16)).save(folder / "deep.png")
    picture.convert("P").save(folder / "palette.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.convert("RGBA").save(folder / "transparent.png")
    return {"truncated.jpg", "zero.png", "text.png", "bomb.png"}


@pytest.mark.runs
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_among_good_ones_train(commands, tmp_path, workers):
    folder = make_pictures(tmp_path / "pictures", each=6)
    bad = write_bad_pictures(folder / "ant")
    keys = ("--config.data.name=imagefolder", f"--config.data.path={folder}", f"--config.data.workers={workers}")
    arguments = ("--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *commands.tiny, *ONE, *keys)
    result = commands.run("launch.py", *arguments, "--config.total_steps=8")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "w" / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in lines} == bad and len(lines) == len(bad)
    assert all(line["reason"] for line in lines)


def test_too_many_bad_pictures_end_the_run(commands, tmp_path):
    folder = make_pictures(tmp_path / "pictures", each=6)
    for i in range(12):
        (folder / "bee" / f"x{i}.png").write_bytes(b"")
    keys = ("--config.data.name=imagefolder", f"--config.data.path={folder}", "--config.total_steps=50")
    result = commands.run(
        "launch.py", "--config", "configs/dit_s2.py", "--workdir", tmp_path / "w", *commands.tiny, *keys
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and last.startswith("launch.py: ") and "data.max_bad_rate" in last, result.stderr
    assert "Traceback" not in result.stderr and not checkpoint.steps(tmp_path / "w")


@pytest.mark.parametrize("arguments", [["--help"], ["--config", "configs/quickstart.py", "--help"]])
def test_help_is_quick(commands, arguments):
    """By the processor's time, which other processes change little."""
    commands.run("launch.py", *arguments)  # once to fill the disk's cache
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = commands.run("launch.py", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == 0 and "--config" in result.stdout and seconds < 3, seconds
    if len(arguments) > 1:
        assert "--config.optim.lr=0.002" in result.stdout and "--config.diffusion.kind=flow" in result.stdout
