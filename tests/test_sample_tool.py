"""tools/sample.py: pictures by label and by prompt, however they are batched and written."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_sd import make_folder

from jdiff.pipelines.kept import KeptPictures, write_npz

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


@pytest.mark.runs
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


def test_kept_pictures_are_those_of_their_facts(tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (7, 4, 6, 3), np.uint8)
    kept = KeptPictures(tmp_path / "parts", {"seed": 0})
    kept.add(whole[:3])
    kept.add(whole[3:5])
    again, other = (KeptPictures(tmp_path / "parts", {"seed": seed}) for seed in (0, 1))
    assert again.done == 5 and other.done == 0
    again.add(whole[5:])
    write_npz(tmp_path / "new" / "a.npz", again, 7, {"labels": np.arange(7)})
    with np.load(tmp_path / "new" / "a.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], whole)
        assert found["labels"].tolist() == list(range(7))
    again.remove()
    assert not (tmp_path / "parts").exists()


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
        (["--prompt", "a fox"], "--prompt: the model in"),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion in diffusers' folder; 8 x 8 latents, 16 x 16 pictures."""
    return make_folder(tmp_path_factory.mktemp("sd"))


def opened(path):
    """A PNG's pixels and the facts in it."""
    with Image.open(path) as image:
        image.load()
        return np.asarray(image).astype(int), json.loads(image.info["jdiff"])


def test_a_picture_by_prompt(commands, folder, tmp_path):
    out = tmp_path / "new" / "fox.png"
    arguments = ("--prompt", "a (red:1.3) fox", "--negative", "blue", "--scheduler", "euler", "--size", "16x24")
    result = commands.run(SAMPLE, folder, *arguments, "--steps", 3, "--seed", 4, "--guidance", 3, "--out", out)
    assert result.returncode == 0 and result.stdout.strip() == f"picture: {out}", result.stderr
    assert "3/3" in result.stderr
    pixels, facts = opened(out)
    assert pixels.shape == (16, 24, 3) and pixels.std() > 5
    expected = {"prompt": "a (red:1.3) fox", "negative_prompt": "blue", "seed": 4, "index": 0, "steps": 3}
    expected |= {"scheduler": "euler", "guidance_scale": 3.0, "height": 16, "width": 24, "run": str(folder)}
    assert expected.items() <= facts.items() and len(facts["model"]) == 16


@pytest.mark.slow
def test_prompts_go_round_and_batches_do_not_matter(commands, folder, tmp_path):
    prompts = ("--prompt", "a fox", "--prompt", "the moon", "--steps", 2, "--scheduler", "euler_ancestral")
    made = {}
    for batch, devices in ((3, 1), (2, 2)):
        out = tmp_path / f"{batch}-{devices}"
        result = commands.run(
            SAMPLE, folder, *prompts, "--num", 3, "--batch-size", batch, "--png-dir", out, devices=devices
        )
        assert result.returncode == 0, result.stderr
        made[out.name] = [opened(path) for path in sorted(out.iterdir())]
    whole = made["3-1"]
    assert [facts["prompt"] for _, facts in whole] == ["a fox", "the moon", "a fox"]
    assert [facts["index"] for _, facts in whole] == [0, 1, 2]
    assert np.abs(whole[0][0] - whole[2][0]).max() > 5
    for parts in made.values():
        for (a, _), (b, _) in zip(parts, whole, strict=True):
            assert np.abs(a - b).max() <= 1
    result = commands.run(SAMPLE, folder, *prompts, "--out", tmp_path / "grid.png", "--npz", tmp_path / "a.npz")
    assert "2 pictures" in result.stdout and "sample grid" in result.stdout, result.stderr
    assert opened(tmp_path / "grid.png")[1]["prompt"] == ["a fox", "the moon"]
    with np.load(tmp_path / "a.npz") as found:
        assert found["prompt"].tolist() == ["a fox", "the moon"]
        assert np.abs(found["arr_0"].astype(int) - np.stack([pixels for pixels, _ in whole[:2]])).max() <= 1


@pytest.mark.slow
def test_from_a_picture_and_within_a_mask(commands, folder, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    image.save(tmp_path / "image.png")
    Image.new("L", image.size, 255).save(tmp_path / "mask.png")
    Image.new("L", (30, 10), 255).save(tmp_path / "other.png")
    common = (SAMPLE, folder, "--prompt", "a fox", "--image", tmp_path / "image.png", "--steps", 2)
    result = commands.run(*common, "--strength", 0.5, "--out", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    pixels, facts = opened(tmp_path / "a.png")
    assert pixels.shape == (20, 30, 3) and facts["strength"] == 0.5 and not facts["mask"]
    masked = (*common, "--mask", tmp_path / "mask.png", "--size", "16", "--out", tmp_path / "b.png")
    result = commands.run(*masked)
    assert result.returncode == 0, result.stderr
    pixels, facts = opened(tmp_path / "b.png")
    assert pixels.shape == (16, 16, 3) and facts["strength"] == 1.0
    assert facts["mask"] == str(tmp_path / "mask.png") and facts["image"] == str(tmp_path / "image.png")
    result = commands.run(*common, "--mask", tmp_path / "other.png", "--out", tmp_path / "c.png")
    assert result.returncode == 2 and "mask is 10 x 30" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--prompt: the model in"),
        (["--labels", "1"], "--labels: the model in"),
        (["--prompt", "a", "--sampler", "ddim"], "--sampler: the model in"),
        (["--prompt", "a", "--size", "big"], "--size=big"),
        (["--prompt", "a", "--size", "15"], "height=15"),
        (["--prompt", "a", "--mask", "m.png"], "m.png"),
        (["--prompt", "a", "--strength", "0.5"], "strength=0.5 without image"),
        (["--prompt", "a", "--scheduler", "eular"], "'euler'"),
        (["--prompt", "a", "--step", "5"], "step=5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_with_prompts_is_one_line(commands, folder, tmp_path, arguments, said):
    result = commands.run(SAMPLE, folder, *arguments, "--out", tmp_path / "grid.png")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sample.py: ") and said in last, result.stderr
    assert not (tmp_path / "grid.png").exists()
