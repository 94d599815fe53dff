"""A cache of latents holds what the VAE says of each picture and its mirror image, and the text encoder of each caption,
whenever it was stopped."""

import argparse
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, make_pictures, wait_until

from jdiff import data

SIZE, C = 32, 4


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A random AutoencoderKL of two levels, as diffusers saves it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=C,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    path = tmp_path_factory.mktemp("vae") / "vae"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures of two classes, one of them broken."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures") / "src")
    (folder / "ant" / "00broken.png").write_bytes(b"")
    return folder


def arguments(src, dest, vae, shard=7):
    sizes = ("--image-size", SIZE, "--batch-size", 3, "--shard-size", shard, "--dtype", "float32")
    return ("tools/cache_latents.py", src, dest, "--vae", vae, *sizes)


@pytest.fixture(scope="module")
def cache(commands, pictures, vae, tmp_path_factory):
    """The pictures' cache, made by the command."""
    dest = tmp_path_factory.mktemp("latents") / "cache"
    done = commands.run(*arguments(pictures, dest, vae))
    assert done.returncode == 0, done.stderr
    assert "1 skipped" in done.stdout and "00broken.png" in done.stderr
    return dest


def moments(vae, images_BHWC):
    """diffusers' own mean and standard deviation, (B, h, w, C) each."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(str(vae)).eval()
    with torch.no_grad():
        x = torch.from_numpy(images_BHWC.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        posterior = model.encode(x).latent_dist
    return [a.permute(0, 2, 3, 1).numpy() for a in (posterior.mean, posterior.std)]


def test_records_are_samples_of_the_posterior_of_either_flip(cache, pictures, vae):
    source = data.open_source("latents", path=str(cache))
    raw = data.open_source("imagefolder", path=str(pictures), image_size=SIZE)
    good = [i for i in range(len(raw)) if not raw.file(i).stem.endswith("broken")]
    assert (len(source), source.kind, source.shape) == (24, "latent", (SIZE // 2, SIZE // 2, C))
    assert (source.class_names, source.num_classes) == (["ant", "bee"], 2)
    for flip in (False, True):
        records = [raw.read(i, flip, np.random.default_rng(0)) for i in good]
        mean, std = moments(vae, np.stack([r["image"] for r in records]))
        draws = np.stack(
            [[source.read(i, flip, np.random.default_rng([i, k]))["latent"] for k in range(40)] for i in range(24)], 1
        )
        assert draws.dtype == np.float32
        score = (draws / 0.18215 - mean) / std
        assert abs(score.mean()) < 5e-3 and abs(score.std() - 1) < 5e-3
        assert np.abs(score.mean(0)).max() < 6 / np.sqrt(40)
        assert [source.read(i, flip, np.random.default_rng(0))["label"] for i in range(24)] == [
            r["label"] for r in records
        ]


def test_batches_of_latents_depend_on_seed_and_step_alone(cache):
    source = data.open_source("latents", path=str(cache))

    def take(start, steps, workers=0):
        with data.batches(source, batch_size=8, seed=1, start_step=start, workers=workers) as reader:
            return [next(reader) for _ in range(steps)]

    whole = take(0, 9)
    assert whole[0]["latent"].dtype == np.float32 and whole[0]["latent"].shape == (8, *source.shape)
    for workers, start in ((0, 5), (2, 4)):
        for a, b in zip(take(start, 9 - start, workers), whole[start:], strict=True):
            assert all(np.array_equal(a[k], b[k]) for k in b)
    seen = {}
    for batch in whole:
        for index, latent in zip(batch["index"], batch["latent"], strict=True):
            seen.setdefault(int(index), []).append(latent)
    assert all(not np.array_equal(a[0], a[1]) for a in seen.values()), "each epoch draws anew"


def test_the_preview_is_nearer_the_pictures_than_one_colour(cache, pictures, vae):
    """A least-squares fit with a constant cannot be worse than the constant alone, on what it was fitted to."""
    source = data.open_source("latents", path=str(cache))
    raw = data.open_source("imagefolder", path=str(pictures), image_size=SIZE)
    good = [i for i in range(len(raw)) if not raw.file(i).stem.endswith("broken")]
    shown_whole = np.stack([raw.read(i, False, np.random.default_rng(0))["image"] for i in good])
    small = shown_whole.reshape(24, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))
    shown = source.preview(moments(vae, shown_whole)[0] * 0.18215)
    assert shown.shape == small.shape and shown.dtype == np.uint8
    assert np.mean((shown - small) ** 2) < 0.98 * np.mean((small.mean((0, 1, 2)) - small) ** 2)


def test_a_killed_run_goes_on_and_ends_the_same(commands, pictures, vae, cache, tmp_path):
    dest = tmp_path / "cache"
    process = commands.start(*arguments(pictures, dest, vae))
    wait_until(lambda: len(list(dest.glob("labels-*.npy"))) >= 2, process)  # of a shard's files the last
    process.kill()
    process.communicate()
    assert not (dest / "meta.json").exists(), "the kill came too late to prove anything"
    with pytest.raises(data.DataError, match="no finished cache"):
        data.open_source("latents", path=str(dest))
    shards = [p.name.removeprefix("labels") for p in dest.glob("labels-*.npy")]
    written = {
        name: (dest / name).stat().st_mtime_ns for shard in shards for name in (f"moments{shard}", f"labels{shard}")
    }
    time.sleep(0.01)
    done = commands.run(*arguments(pictures, dest, vae))
    assert done.returncode == 0, done.stderr
    assert all((dest / name).stat().st_mtime_ns == when for name, when in written.items()), "whole shards are kept"
    for file in sorted(cache.iterdir()):
        assert (dest / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_shard_of_broken_pictures_alone_is_no_trouble(commands, vae, tmp_path):
    folder = make_pictures(tmp_path / "src")
    for i in range(9):
        (folder / "ant" / f"00{i}.png").write_bytes(b"")
    done = commands.run(*arguments(folder, tmp_path / "cache", vae, shard=4))
    assert done.returncode == 0, done.stderr
    source = data.open_source("latents", path=str(tmp_path / "cache"))
    labels = [source.read(i, False, np.random.default_rng(0))["label"] for i in range(len(source))]
    assert labels == sorted(labels) and labels.count(1) == 12


def damages(path):
    """(name, what it does to the cache at `path`)."""
    shard = path / "moments-00001.npy"
    yield "short shard", lambda: shard.write_bytes(shard.read_bytes()[:-100])
    yield "no shard", shard.unlink
    yield "empty shard", lambda: shard.write_bytes(b"")
    yield "no labels", (path / "labels.npy").unlink
    yield "few labels", lambda: np.save(path / "labels.npy", np.zeros(3, np.int32))
    yield "cut meta", lambda: (path / "meta.json").write_text('{"format": 1')
    meta = json.loads((path / "meta.json").read_text())
    yield "old format", lambda: (path / "meta.json").write_text(json.dumps({**meta, "format": 0}))


@pytest.mark.parametrize(
    "name", ["short shard", "no shard", "empty shard", "no labels", "few labels", "cut meta", "old format"]
)
def test_a_damaged_cache_is_one_line(cache, tmp_path, name):
    path = shutil.copytree(cache, tmp_path / "cache")
    dict(damages(path))[name]()
    with pytest.raises(data.DataError) as caught:
        data.open_source("latents", path=str(path))
    assert "anew" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"src": "none"}, "does not exist"), ({"vae": "none"}, "config.json is missing"), ({"shard": 5}, "another cache")],
)
def test_what_the_command_cannot_do_is_one_line(commands, pictures, vae, cache, change, words):
    before = {p.name: p.read_bytes() for p in cache.iterdir()}
    done: subprocess.CompletedProcess[str] = commands.run(
        *arguments(**{"src": pictures, "dest": cache, "vae": vae, **change})
    )
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == before


CAPTIONS = {i: [f"picture {i}", "a café", "x"][: 1 + i % 3] for i in range(12)} | {5: ["long " * 40], 8: ["Öl 🍎"]}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """12 pictures with one to three captions each; the sixth's is too long."""
    folder = make_pictures(tmp_path_factory.mktemp("captioned") / "src", classes=("all",))
    rows = [{"file_name": f"all/{i}.png", "text": CAPTIONS[i]} for i in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A folder with a random text encoder, as transformers saves it, and a small tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jdiff.tokens import Tokenizer

    path = tmp_path_factory.mktemp("sd")
    tokenizer = Tokenizer.train(["picture", "a café"] * 3, 520)
    tokenizer.save(path / "tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = transformers.CLIPTextConfig(**sizes, **tokens, pad_token_id=tokenizer.pad_id)
    transformers.CLIPTextModel(config).save_pretrained(path / "text_encoder")
    return path


@pytest.fixture(scope="module")
def text_cache(commands, captioned, vae, sd, tmp_path_factory):
    """The captioned pictures' cache with contexts, made by the command."""
    dest = tmp_path_factory.mktemp("latents") / "cache"
    done = commands.run(*arguments(f"captions:{captioned}", dest, vae, shard=5), "--text", sd)
    assert done.returncode == 0, done.stderr
    assert "1 skipped" in done.stdout and "40" not in done.stdout and "long long" in done.stderr
    return dest


def contexts(sd, texts):
    """transformers' own last hidden states, (B, S, E)."""
    import torch
    import transformers

    from jdiff.tokens import Tokenizer

    ids = torch.from_numpy(Tokenizer.from_folder(sd / "tokenizer")(texts)).long()
    with torch.no_grad():
        return transformers.CLIPTextModel.from_pretrained(sd / "text_encoder").eval()(ids).last_hidden_state.numpy()


def test_each_caption_has_the_text_encoders_context(text_cache, captioned, sd, vae):
    source = data.open_source("latents", path=str(text_cache))
    kept = [CAPTIONS[i] for i in range(12) if i != 5]
    assert source.has_captions and [source.texts(i) for i in range(len(source))] == kept
    np.testing.assert_allclose(source.null_context, contexts(sd, [""])[0], atol=1e-5)
    raw = data.open_source("captions", path=str(captioned), image_size=SIZE)
    images = [raw.read(i, False, np.random.default_rng(0))["image"] for i in range(12) if i != 5]
    mean, std = moments(vae, np.stack(images))
    for copy in (source, pickle.loads(pickle.dumps(source))):
        drawn = set()
        for i, texts in enumerate(kept):
            expected = dict(zip(texts, contexts(sd, texts), strict=True))
            for k in range(8):
                record = copy.read(i, False, np.random.default_rng(k))
                assert record["context"].dtype == np.float32
                np.testing.assert_allclose(record["context"], expected[record["caption"]], atol=1e-5)
                drawn.add(record["caption"])
                assert np.abs((record["latent"] / 0.18215 - mean[i]) / std[i]).max() < 6
        assert drawn == {text for texts in kept for text in texts}
    with data.batches(source, batch_size=4, seed=0) as reader:
        batch = next(reader)
    assert {k: v.shape for k, v in batch.items()} == {
        "latent": (4, *source.shape),
        "label": (4,),
        "context": (4, 77, 16),
        "index": (4,),
    }


def test_a_killed_run_with_captions_ends_the_same(commands, captioned, vae, sd, text_cache, tmp_path):
    dest = tmp_path / "cache"
    shutil.copytree(text_cache, dest)
    for name in ("meta.json", "labels.npy", "captions.npz", "null_context.npy", "moments-00002.npy"):
        (dest / name).unlink()
    (dest / "context-00001.npy").unlink()  # as if killed between two files of a shard
    done = commands.run(*arguments(f"captions:{captioned}", dest, vae, shard=5), "--text", sd)
    assert done.returncode == 0, done.stderr
    for file in sorted(text_cache.iterdir()):
        assert (dest / file.name).read_bytes() == file.read_bytes(), file.name
    done = commands.run(*arguments(f"captions:{captioned}", dest, vae, shard=5))
    assert done.returncode == 2 and "another cache" in done.stderr, "without --text it is another cache"


def test_captions_are_kept_without_a_text_encoder(commands, captioned, vae, tmp_path):
    done = commands.run(*arguments(f"captions:{captioned}", tmp_path / "cache", vae))
    assert done.returncode == 0 and "0 skipped" in done.stdout, done.stderr
    source = data.open_source("latents", path=str(tmp_path / "cache"))
    record = source.read(8, False, np.random.default_rng(0))
    assert record.keys() == {"latent", "label", "caption"} and record["caption"] == "Öl 🍎"
    assert source.null_context is None and len(source) == 12


@pytest.mark.parametrize("name", ["captions.npz", "null_context.npy", "context-00000.npy", "context-00001.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damaged_captions_or_contexts_are_one_line(text_cache, tmp_path, name, damage):
    path = shutil.copytree(text_cache, tmp_path / "cache")
    whole = (path / name).read_bytes()
    (path / name).unlink()
    if damage == "cut":
        (path / name).write_bytes(whole[: len(whole) // 2])
    if damage == "other":
        np.save(path / "other.npy", np.zeros((2, 3), np.float32))
        (path / "other.npy").rename(path / name)
    with pytest.raises(data.DataError) as caught:
        data.open_source("latents", path=str(path))
    assert "anew" in str(caught.value) and "\n" not in str(caught.value)


def tool():
    """tools/cache_latents.py as a module."""
    spec = importlib.util.spec_from_file_location("cache_latents", ROOT / "tools" / "cache_latents.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cache_latents"] = module  # which dataclasses look themselves up in
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("image_size", "devices", "pictures"),
    [(256, 1, 16), (64, 2, 16), (512, 1, 4), (512, 8, 8), (1024, 1, 1), (256, 3, 15)],
)
def test_large_pictures_are_encoded_few_at_a_time(image_size, devices, pictures):
    assert tool().pictures_at_once(image_size, devices) == pictures


def test_a_vae_comes_from_a_run_too(vae, tmp_path, monkeypatch):
    import jdiff
    from jdiff import convert

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(jdiff, "load", lambda path: convert.load_component(vae), raising=False)
    images = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    found, expected = tool().load_vae(tmp_path, 16), moments(vae, images)
    mean, logvar = np.split(found.encode(images), 2, axis=-1)
    np.testing.assert_allclose(mean, expected[0], atol=1e-4)
    np.testing.assert_allclose(np.exp(0.5 * logvar), expected[1], atol=1e-4)
    assert found.digest == tool().load_vae(vae, 8).digest and found.scaling_factor == 0.18215
    with pytest.raises(ValueError, match="--batch-size 9 does not divide over 8 devices"):
        tool().load_vae(vae, 9)


@pytest.mark.parametrize(
    ("src", "text", "words"),
    [
        ("pictures", "sd", "has no captions"),
        ("captioned", "none", "config.json is missing"),
        ("captioned", "vae", "holds AutoencoderKL"),
        ("captioned", "no tokenizer", "tokenizer"),
    ],
)
def test_text_that_cannot_be_encoded_is_one_line(pictures, captioned, vae, sd, tmp_path, src, text, words):
    shutil.copytree(sd / "text_encoder", tmp_path / "text_encoder")
    folder = {"sd": sd, "vae": vae, "none": tmp_path / "none", "no tokenizer": tmp_path}[text]
    path = {"pictures": str(pictures), "captioned": f"captions:{captioned}"}[src]
    sizes = {"image_size": SIZE, "batch_size": 8, "shard_size": 5, "dtype": "float32"}
    options = argparse.Namespace(src=path, dest=tmp_path / "cache", vae=vae, text=folder, **sizes)
    with pytest.raises(ValueError, match=words) as caught:
        tool().run(options)
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()
