"""tools/sample.py: pictures by label, however they are batched and written."""

import json

import numpy as np
import pytest
from PIL import Image

SAMPLE = "tools/sample.py"


@pytest.fixture(scope="module")
def run(commands, image_folder, tmp_path_factory):
    """A trained run of the classes ant and bee."""
    workdir = tmp_path_factory.mktemp("sample") / "a"
    keys = ("--config.data.name=imagefolder", f"--config.data.path={image_folder}", "--config.total_steps=30")
    more = ("--config.optim.lr=3e-3", "--config.ema.decay=0.5")
    arguments = ("--config", "configs/dit_s2.py", "--workdir", workdir, *commands.tiny, *keys, *more)
    result = commands.run("launch.py", *arguments)
    assert result.returncode == 0, result.stderr
    return workdir


def sampled(commands, run, out, *arguments, **options):
    """The pictures and labels that the tool writes to an npz."""
    common = ("--steps", 5, "--npz", out / "s.npz")
    result = commands.run(SAMPLE, run, *common, *arguments, **options)
    assert result.returncode == 0, result.stderr
    assert f"{out / 's.npz'}" in result.stdout and "sample grid" not in result.stdout
    with np.load(out / "s.npz") as found:
        return found["arr_0"].astype(int), found["labels"]


def test_a_grid_by_numbers_and_names(commands, run, tmp_path):
    out = tmp_path / "new" / "grid.png"
    result = commands.run(SAMPLE, run, "--labels", "1,ant,BEE", "--steps", 3, "--seed", 4, "--out", out)
    assert result.returncode == 0 and result.stdout.strip() == f"sample grid: {out}", result.stderr
    with Image.open(out) as image:
        image.load()
        facts = json.loads(image.info["jdiff"])
    assert facts["labels"] == [1, 0, 1] and facts["seed"] == 4 and facts["steps"] == 3
    assert facts["guidance_scale"] == 4.0 and facts["run"] == str(run)


def test_a_picture_does_not_depend_on_its_batch(commands, run, tmp_path):
    ddpm = ("--sampler", "ddpm", "--guidance", 2)
    whole, labels = sampled(commands, run, tmp_path, "--num", 7, "--batch-size", 7, *ddpm)
    assert whole.shape == (7, 8, 8, 3) and labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for batch in (1, 3):
        parts, again = sampled(commands, run, tmp_path, "--num", 7, "--batch-size", batch, *ddpm)
        assert np.abs(parts - whole).max() <= 1 and (parts == whole).mean() > 0.99 and (again == labels).all()
    spread, _ = sampled(commands, run, tmp_path, "--num", 7, "--batch-size", 7, *ddpm, devices=8)
    assert np.abs(spread - whole).max() <= 1
    distinct = {picture.tobytes() for picture in whole}
    assert len(distinct) == 7
    other, _ = sampled(commands, run, tmp_path, "--num", 7, "--seed", 1, *ddpm)
    assert not any((a == b).all() for a, b in zip(whole, other, strict=True))


def test_num_goes_round_the_labels_into_a_folder(commands, run, tmp_path):
    result = commands.run(SAMPLE, run, "--num", 3, "--labels", "bee", "--steps", 2, "--png-dir", tmp_path / "p")
    assert result.returncode == 0, result.stderr
    paths = sorted((tmp_path / "p").iterdir())
    assert [p.name for p in paths] == ["00000.png", "00001.png", "00002.png"]
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            image.load()
            facts = json.loads(image.info["jdiff"])
        assert image.size == (8, 8) and facts["labels"] == 1 and facts["index"] == i


def test_raw_weights_are_others(commands, run, tmp_path):
    average, _ = sampled(commands, run, tmp_path, "--num", 2)
    raw, _ = sampled(commands, run, tmp_path, "--num", 2, "--weights", "raw")
    assert (average != raw).any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--labels", "wasp"], "'wasp'"),
        (["--labels", "2"], "0..1"),
        (["--labels", ""], "label"),
        (["--num", "0"], "--num=0"),
        (["--steps", "0"], "--steps=0"),
        (["--sampler", "euler"], "euler"),
        (["--step", "7"], "no checkpoint of step 7"),
        (["--steps", "100000"], "100000"),
        (["--guidance-interval", "0.8", "0.2"], "interval"),
    ],
)
def test_a_mistake_is_one_line(commands, run, tmp_path, arguments, said):
    result = commands.run(SAMPLE, run, *arguments, "--out", tmp_path / "grid.png")
    lines = [line for line in result.stderr.strip().splitlines() if "image/s" not in line]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert lines[-1].startswith("sample.py: ") and said in lines[-1], result.stderr
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_a_folder_without_a_run_is_one_line(commands, tmp_path, path):
    result = commands.run(SAMPLE, tmp_path / path)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert str(tmp_path) in result.stderr
