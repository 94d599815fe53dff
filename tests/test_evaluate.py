"""From pictures to scores: the classifier trains, worse pictures score worse, and unlike things are not compared."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_pictures, wait_until
from PIL import Image

import jdiff
from jdiff import checkpoint, sharding, train
from jdiff import config as configs
from jdiff.data import DataError
from jdiff.evaluate.features import Network
from jdiff.evaluate.moments import Moments
from jdiff.evaluate.networks import open_network, resized
from jdiff.evaluate.pictures import batches, moments_of, open_pictures, save_moments
from jdiff.evaluate.scores import Reference, scores
from jdiff.report import SPEED

CLASSIFIER = ("--config.data.image_size=16", "--config.model.widths=8,16", "--config.batch_size=16")


def pixels(params, image):
    """A network for tests: a picture's mean colours by quarter."""
    x = image.astype(np.float32).reshape(len(image), 2, image.shape[1] // 2, 2, -1, 3).mean((2, 4)).reshape(-1, 12)
    return x * params, x[:, :5]


NETWORK = Network("pixels", np.float32(1.0), pixels)
COLOURS = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3), dtype=np.uint8)
PICTURES = np.repeat(np.repeat(COLOURS, 4, 1), 4, 2)


@pytest.fixture(scope="module")
def classifier(commands, tmp_path_factory):
    """A run of the classifier on OpenMoji, seconds long."""
    workdir = tmp_path_factory.mktemp("classifier")
    steps = ("--config.total_steps=40", "--config.sample_every=20", "--config.checkpoint_every=20")
    config = ("--config", "configs/classifier_openmoji.py", "--workdir", workdir, "--config.log.tensorboard=false")
    done = commands.run("launch.py", *config, *CLASSIFIER, *steps)
    assert done.returncode == 0, done.stderr
    return workdir


def test_the_classifier_learns(classifier):
    records = [json.loads(line) for line in (classifier / "metrics.jsonl").read_text().splitlines()]
    told = [r["heldout_accuracy"] for r in records if "heldout_accuracy" in r]
    assert told[-1] > 0.25  # a tenth by chance
    assert Image.open(sorted((classifier / "samples").glob("*.png"))[-1]).width > 200
    model, params = jdiff.load(classifier)
    logits, features = model.apply({"params": params}, np.zeros((3, 16, 16, 3), np.float32))
    assert logits.shape == (3, 10) and features.shape == (3, 16)


def test_features_do_not_depend_on_batches_or_devices():
    few = sharding.make_mesh(devices=jax.devices()[:1])
    whole = NETWORK.features([PICTURES], few)
    np.testing.assert_array_equal(whole.pool_ND, pixels(1.0, PICTURES)[0])
    for size, mesh in ((7, few), (90, None), (32, None)):
        cut = NETWORK.features((PICTURES[i : i + size] for i in range(0, 90, size)), mesh)
        np.testing.assert_array_equal(cut.pool_ND, whole.pool_ND)
        np.testing.assert_array_equal(cut.logits_NK, whole.logits_NK)


def test_worse_pictures_score_worse(classifier):
    """Noise, a little of it and more, by the network trained just now."""
    network = open_network(classifier)
    pictures = np.concatenate(list(batches(open_pictures("openmoji", 16), 400)))
    reference = Reference.of("openmoji", network.features([pictures[::2]]))
    rng, found = np.random.default_rng(0), []
    for amount in (0, 20, 60, 120):
        noisy = pictures[1::2] + rng.normal(size=(200, 16, 16, 3)) * amount
        features = network.features([np.clip(noisy, 0, 255).astype(np.uint8)])
        found.append(scores(features, reference, ("fid", "kid"), resamples=5))
    for metric in ("fid", "kid"):
        values = [scored[metric].value for scored in found]
        assert values == sorted(values) and values[-1] > 3 * max(values[0], 1e-9)
        assert all(scored[metric].low < scored[metric].value < scored[metric].high for scored in found)


@pytest.mark.parametrize("shape", [(64, 48), (299, 299), (512, 640)])
def test_pictures_are_resized_as_pytorch_fid_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    x = torch.tensor(image).permute(0, 3, 1, 2).float() / 255
    expected = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
    # its places of samples, up to 640, are rounded to fp32
    np.testing.assert_allclose(resized(image, 299, "torch"), expected.permute(0, 2, 3, 1), atol=2e-4)


def test_pictures_are_resized_as_tensorflow_did():
    """Corners at 0: output i lies at i * n / size of the input."""
    row = np.array([0, 128, 255], np.uint8)
    image = np.broadcast_to(row[None, None, :, None], (1, 1, 3, 3))
    found = np.asarray(resized(image, 6, "tf"))[0, 0, :, 0] * 128 + 128
    np.testing.assert_allclose(found, [0, 64, 128, 191.5, 255, 255], atol=1e-3)


def test_moments_of_a_file_are_a_reference(tmp_path):
    features = NETWORK.features([PICTURES])
    own = Moments.of(features.pool_ND)
    np.savez(tmp_path / "m.npz", mu=own.mean_D, sigma=own.covariance_DD)
    reference = moments_of(str(tmp_path / "m.npz"))
    assert scores(features, reference, ("fid",), resamples=0)["fid"].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"kid needs the reference's pictures, and .*m\.npz holds moments alone"):
        scores(features, reference, ("kid",))
    save_moments(tmp_path / "own.npz", Reference.of("ninety", features))
    kept = moments_of(str(tmp_path / "own.npz"))
    assert kept.pool.count == 90 and kept.network == "pixels" and kept.title.endswith("own.npz (ninety)")
    assert scores(features, kept, ("fid",), resamples=0)["fid"].value == pytest.approx(0, abs=1e-6)
    other = dataclasses.replace(NETWORK, title="others").features([PICTURES])
    with pytest.raises(ValueError, match=r"holds features of pixels, and the samples' are of others: they do not"):
        scores(other, kept, ("fid",))
    np.savez(tmp_path / "p.npz", arr_0=PICTURES)
    assert moments_of(str(tmp_path / "p.npz")) is None
    np.testing.assert_array_equal(np.concatenate(list(batches(open_pictures(str(tmp_path / "p.npz"), 0)))), PICTURES)


def test_a_mistake_is_one_line(tmp_path, classifier):
    features = NETWORK.features([PICTURES])
    np.savez(tmp_path / "x.npz", arr_0=PICTURES[0])
    np.savez(tmp_path / "y.npz", other=PICTURES)
    (tmp_path / "z.npz").write_text("no zip")
    cases = (
        (r"metric 'fdi' is unknown \(did you mean 'fid'", lambda: scores(features, None, ("fdi",))),
        (r"fid compares with a reference", lambda: scores(features, None, ("fid",))),
        (r"sfid takes maps", lambda: scores(features, Reference.of("a", features), ("sfid",))),
        (r"there are no pictures", lambda: NETWORK.features([])),
        (r"arr_0 is uint8\[8, 8, 3\], not", lambda: open_pictures(str(tmp_path / "x.npz"), 0)),
        (r"holds \['other'\], and pictures are in arr_0", lambda: open_pictures(str(tmp_path / "y.npz"), 0)),
        (r"z\.npz cannot be read", lambda: moments_of(str(tmp_path / "z.npz"))),
        (r"none is neither a run, nor CLIP.s folder, nor a file", lambda: open_network(tmp_path / "none")),
        (r"resize='tff' is unknown \(did you mean 'tf'", lambda: open_network(tmp_path / "x.npz", "tff")),
    )
    for said, call in cases:
        with pytest.raises((ValueError, DataError), match=said) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory):
    """A run of classes, seconds long."""
    workdir = tmp_path_factory.mktemp("made") / "run"
    run = commands.run(
        "launch.py", "--config", "configs/quickstart.py", "--workdir", workdir, *TINY, "--config.total_steps=2"
    )
    assert run.returncode == 0, run.stderr
    return workdir


@pytest.mark.runs
def test_a_killed_scoring_goes_on(commands, classifier, made, tmp_path):
    """The features of a batch are kept when they are made; the scores are those of a scoring that nothing stopped."""
    settings = (made, "--network", classifier, "--reference", "openmoji", "--metrics", "fid,kid,is", "--resamples", 3)
    settings = (*settings, "--num", 400, "--batch-size", 8, "--steps", 4)
    whole, resumed = (
        ("tools/evaluate.py", *settings, "--json", tmp_path / f"{name}.jsonl") for name in ("whole", "resumed")
    )
    assert commands.run(*whole).returncode == 0
    kept = ("--features", tmp_path / "features")
    parts = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*.npz")}  # noqa: E731
    process = commands.start(*resumed, *kept)
    wait_until(lambda: len(parts()) >= 3, process, 120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = parts()
    assert 3 <= len(before) < 50, "it was killed too late to say anything"
    damaged = sorted(before)[-1]  # as a machine that lost its power may leave it
    damaged.write_bytes(damaged.read_bytes()[:-40])
    done = commands.run(*resumed, *kept)
    assert done.returncode == 0 and f"{8 * (len(before) - 1)} pictures' features are in" in done.stderr, done.stderr
    after = parts()
    assert len(after) == 50 + 2 and {p for p in before if after[p] != before[p]} == {damaged}
    lines = [(tmp_path / f"{name}.jsonl").read_text() for name in ("whole", "resumed")]
    assert lines[0] == lines[1]
    again = commands.run(*resumed, *kept)
    assert again.returncode == 0 and parts() == after and (tmp_path / "resumed.jsonl").read_text() == lines[1]
    other = commands.run(*resumed, *kept, "--seed", 1)
    assert other.returncode == 0 and len(parts()) == len(after) + 50


def test_a_reference_of_both_is_held_against_both(commands, classifier, tmp_path):
    """As ADM's files: fid by its moments, kid by its pictures."""
    network, rng = open_network(classifier), np.random.default_rng(1)
    samples, few = PICTURES[:40], rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    moments = Moments.of(network.features([PICTURES[40:]]).pool_ND)
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    np.savez(tmp_path / "both.npz", arr_0=few, mu=moments.mean_D, sigma=moments.covariance_DD)
    done = commands.run(
        *("tools/evaluate.py", tmp_path / "samples.npz", "--reference", tmp_path / "both.npz", "--network", classifier),
        *("--metrics", "fid,kid", "--resamples", 0, "--json", tmp_path / "scores.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "scores.jsonl").read_text())
    features = network.features([samples])
    by_pictures = scores(features, Reference.of("few", network.features([few])), ("fid", "kid"), resamples=0)
    by_moments = scores(features, Reference("many", moments), ("fid",), resamples=0)
    assert line["fid"][0] == pytest.approx(by_moments["fid"].value, rel=1e-5)
    assert line["kid"][0] == pytest.approx(by_pictures["kid"].value, rel=1e-5)
    assert abs(by_pictures["fid"].value / by_moments["fid"].value - 1) > 0.01


@pytest.mark.runs
def test_the_tool_scores_a_run_and_a_folder(commands, classifier, made, tmp_path):
    make_pictures(tmp_path / "pictures", each=12)
    shutil.copytree(made, tmp_path / "run")
    common = ("--network", classifier, "--resamples", 2)
    kept = {"run": tmp_path / "run" / "scores.jsonl", "pictures": tmp_path / "scores.jsonl"}
    for source in (tmp_path / "run", tmp_path / "pictures"):
        size = () if source.name == "run" else ("--image-size", 8, "--json", kept["pictures"])
        settings = ("--num", 20, "--steps", 2, "--reference", "openmoji", "--save-reference", tmp_path / "moments.npz")
        done = commands.run("tools/evaluate.py", source, *common, *settings, *size)
        assert done.returncode == 0, done.stderr
        assert "count 20" in done.stdout and "network classifier" in done.stdout and "recall" in done.stdout
    lines = [json.loads(path.read_text()) for path in kept.values()]
    assert all(line["fid"][0] > 0 and line["count"] == 20 for line in lines)
    assert lines[0]["network"] == lines[1]["network"] and lines[0]["step"] == 2
    again = (
        "--reference",
        tmp_path / "moments.npz",
        "--metrics",
        "fid",
        "--num",
        20,
        "--image-size",
        8,
        "--json",
        kept["pictures"],
    )
    done = commands.run("tools/evaluate.py", tmp_path / "pictures", *common, *again)
    assert done.returncode == 0, done.stderr
    fid = json.loads(kept["pictures"].read_text().splitlines()[-1])["fid"]
    np.testing.assert_allclose(fid, lines[1]["fid"], rtol=1e-6)
    wrong = commands.run("tools/evaluate.py", tmp_path / "pictures", *common, "--reference", "openmoji")
    assert wrong.returncode == 2 and wrong.stderr.strip().startswith("evaluate.py: --image-size is missing")


def outcome(workdir, step=4):
    """(a checkpoint's checksums and window, the records without the machine's speed, those of scores apart)."""
    meta = checkpoint.read_meta(workdir, step)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in SPEED} for line in lines]
    told = [r for r in records if "fid" in r]
    return (meta["checksums"], meta["window"]), [r for r in records if r not in told], told


@pytest.mark.runs
def test_a_run_scores_itself_and_trains_as_without(commands, classifier, tmp_path):
    keys = (*TINY, "--config.total_steps=4", "--config.checkpoint_every=2", "--config.log_every=3")
    scoring = ("--config.eval_every=2", f"--config.eval.network={classifier}", "--config.eval.num=20")
    scoring = (
        *scoring,
        "--config.eval.reference=30",
        "--config.eval.resamples=3",
        "--config.eval.metrics=fid,kid,recall",
    )

    def launch(name, *more):
        done = commands.run(
            "launch.py", "--config", "configs/quickstart.py", "--workdir", tmp_path / name, *keys, *more
        )
        assert done.returncode == 0, done.stderr
        return outcome(tmp_path / name)

    plain, scored = launch("plain"), launch("scored", *scoring)
    assert scored[:2] == plain[:2] and plain[2] == []
    assert [r["step"] for r in scored[2]] == [2, 4] and all(r["fid"] > 0 and 0 <= r["recall"] <= 1 for r in scored[2])
    file = tmp_path / "scored" / "scores.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[0]["reference"] == "30 of openmoji"
    for line, record in zip(lines, scored[2], strict=True):
        assert all(line[name][0] == record[name] and line[name][1] <= line[name][0] for name in ("fid", "kid"))
    assert "recall" in (tmp_path / "scored" / "report.html").read_text()
    # adapters that change nothing yet are scored as their base
    lora = (f"--config.init_from={tmp_path / 'plain'}", "--config.lora.rank=2", "--config.optim.lr=1e-12")
    done = commands.run(
        *("launch.py", "--config", "configs/quickstart.py", "--workdir", tmp_path / "lora", *keys, *scoring, *lora),
        "--config.total_steps=1",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "lora" / "scores.jsonl").read_text())
    assert told["step"] == 1 and told["fid"][0] == pytest.approx(lines[1]["fid"][0], rel=1e-3)
    # the tool says the same of the checkpoint
    settings = ("--num", 20, "--steps", 2, "--guidance", 2.0, "--batch-size", 8, "--metrics", "fid,kid")
    tool = ("tools/evaluate.py", tmp_path / "scored", "--network", classifier, "--reference", "openmoji", *settings)
    done = commands.run(*tool, "--json", tmp_path / "json", "--resamples", 3)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "json").read_text())
    same = set(told) - {"fid", "kid", "reference"}
    assert {k: told[k] for k in same} == {k: lines[1][k] for k in same} and set(told) == set(lines[1]) - {"recall"}
    # a step that is trained again is scored again, against features that are not made again, and stands there once
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "scored" / "features").rglob("*.npz")}
    assert len(kept) == 1
    shutil.rmtree(tmp_path / "scored" / "checkpoints" / "4")
    assert launch("scored", *scoring) == scored
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines
    assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "scored" / "features").rglob("*.npz")}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("eval_every=2",), r"eval_every=2 needs a network to score by: --config\.eval\.network=…"),
        (("eval_every=-2",), r"eval_every=-2 must not be below 0"),
        (("eval_every=2", "eval.network=NETWORK", "eval.metrics=fdi"), r"'fdi' is unknown \(did you mean 'fid'"),
        (
            ("eval_every=2", "eval.network=NETWORK", "eval.metrics=sfid"),
            r"sfid takes maps of features, which classifier",
        ),
        (("eval_every=2", "eval.network=NETWORK", "eval.metrics=psnr"), r"psnr compares picture by picture"),
        (("eval_every=2", "eval.network=NETWORK", "eval.metrics=clip"), r"clip takes prompts, and a run of classes"),
        (("eval_every=2", "eval.network=none/such"), r"none/such is neither a run"),
    ],
)
def test_a_run_that_cannot_be_scored_is_refused_at_once(classifier, keys, said):
    config = configs.load_file("configs/quickstart.py")
    for key in keys:
        configs.override(config, *key.replace("NETWORK", str(classifier)).split("="))
    with pytest.raises(ValueError, match=said) as error:
        train.Setup(config)
    assert "\n" not in str(error.value)
