"""LoRA through the training loop: only adapters are trained and kept, a resumed run goes on bit by bit, and the run's adapters
come back onto their base, and onto no other."""

import math
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import make_pictures
from tiny_sd import make_folder

import jdiff
from jdiff import checkpoint, lora, sharding, train, tree
from jdiff import config as configs
from jdiff.loading import load_adapters
from jdiff.tasks.adapters import parse_rules

pytestmark = pytest.mark.usefixtures("compiled")
RANK = {"lora.rank": 2, "lora.alpha": 4.0}
QUICK = {"steps": 3, "scheduler": "ddim", "output": "np"}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sd"), levels=1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), ("all",), 16) / "all"
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a red fox")
    return folder


def make_config(base, pictures, **changes):
    config = configs.default("text_to_image")
    values = {
        **{"init_from": str(base), "data.name": "captions", "data.path": str(pictures), "data.image_size": 16},
        **{"batch_size": 8, "total_steps": 4, "checkpoint_every": 2, "sample_every": 4, "log_every": 1},
        **{"log.tensorboard": False, "optim.lr": 1e-2, "sample.steps": 2, "sample.prompts": ("a red fox",), **RANK},
    }
    config.update_from_flattened_dict({**values, **changes})
    return config


@pytest.fixture(scope="session")
def run(base, pictures, tmp_path_factory):
    """A finished LoRA run of UNet and text encoder."""
    workdir = tmp_path_factory.mktemp("run")
    train.fit(make_config(base, pictures, **{"text.train": True}), workdir)
    return workdir


def state_of(workdir, step):
    meta = checkpoint.read_meta(workdir, step)
    return meta["arrays"], meta["checksums"], meta


@pytest.mark.runs
def test_a_checkpoint_holds_adapters_alone(run):
    arrays, _, meta = state_of(run, 4)
    assert all(path.split("/")[1] in ("lora", "step", "opt_state") for path in arrays)
    parts = {path.rsplit("/", 1)[-1] for path in arrays if path.startswith("params/")}
    assert parts == {"a", "b"}
    assert set(meta["lora"]["base"]) == {"unet", "text"}
    sizes = {path: math.prod(int(n) for n in re.findall(r"[[,](\d+)", text)) for path, text in arrays.items()}
    trained = sum(size for path, size in sizes.items() if path.startswith("params/"))
    assert trained > 0  # of which there are four: they, their average, and two moments
    assert 4 * trained <= sum(sizes.values()) < 4.02 * trained


@pytest.mark.runs
def test_only_adapters_change(base, pictures):
    setup = train.Setup(make_config(base, pictures))
    state = setup.fresh_state()
    before = jax.tree.map(np.asarray, state.base)
    batch = sharding.put_batch(setup.mesh, next(iter(setup.batches(0, pictures))))
    state, metrics = setup.step(state, batch)
    assert np.isfinite(metrics["loss"])
    for path, leaf in tree.flatten(state.base).items():
        np.testing.assert_array_equal(tree.flatten(before)[path], leaf, err_msg=path)
    b = [leaf for path, leaf in tree.flatten(state.params).items() if path.endswith("/b")]
    assert b and all(np.abs(leaf).max() > 0 for leaf in b)
    assert tree.count(state.opt_state) < 0.1 * 2 * tree.count(state.base)


@pytest.mark.runs
def test_a_resumed_run_equals_an_uninterrupted_one(run, base, pictures, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train.fit(make_config(base, pictures, **{"text.train": True}), tmp_path / "again")
    assert state_of(run, 4)[1] == state_of(tmp_path / "again", 4)[1]


@pytest.mark.runs
def test_another_base_is_refused_unless_told(run, base, pictures, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    shutil.copytree(run, tmp_path / "run")
    unet, params = jdiff.load(base / "unet")
    moved = jax.tree.map(lambda x: np.asarray(x) + 0.01, params)
    from jdiff import convert

    convert.write(convert.from_models({"unet": (unet, moved)}), tmp_path / "unet", "diffusers")
    shutil.copy(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", other / "unet")
    config = make_config(other, pictures, **{"text.train": True, "total_steps": 5})
    with pytest.raises(ValueError, match=r"another base.*lora\.any_base=true"):
        train.fit(config, tmp_path / "run")
    with pytest.raises(ValueError, match="another unet than the adapters were trained on"):
        jdiff.pipeline(other, lora=[run])
    config.lora.any_base = True
    train.fit(config, tmp_path / "run")


@pytest.mark.runs
def test_the_runs_adapters_come_back(run, base):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    plain, adapted = jdiff.pipeline(base, mesh=mesh), jdiff.pipeline(base, mesh=mesh, lora=[(run, 1.0)])
    itself = jdiff.pipeline(run, mesh=mesh)
    first, second, third = (pipe("a red fox", **QUICK) for pipe in (plain, adapted, itself))
    np.testing.assert_array_equal(second, third)
    assert np.abs(first - second).max() > 1e-5
    traces = adapted._loop._cache_size()
    adapted.set_lora_scale(0.0)
    np.testing.assert_array_equal(adapted("a red fox", **QUICK), first)
    adapted.set_lora_scale(1.0, run.name)
    np.testing.assert_array_equal(adapted("a red fox", **QUICK), second)
    assert adapted._loop._cache_size() == traces
    assert adapted.facts("a red fox")[0]["lora"] == {run.name: 1.0}
    with pytest.raises(ValueError, match=r"no LoRA b; there are"):
        adapted.set_lora_scale(1.0, "b")
    with pytest.raises(ValueError, match="no LoRA attached"):
        plain.set_lora_scale(1.0)


@pytest.mark.runs
def test_two_adapters_add_up(run, base):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, once = jdiff.load(base, mesh=mesh, lora=[run])
    _, twice = jdiff.load(base, mesh=mesh, lora=[(run, 0.25), (run, 0.75)])
    merged = [lora.merge(*_split(params)) for params in (once, twice)]
    for path, leaf in tree.flatten(merged[0]).items():
        np.testing.assert_allclose(leaf, tree.flatten(merged[1])[path], atol=1e-5, err_msg=path)


def _split(params):
    """(base, adapters of all attachments with their strengths)."""
    base, found = lora.detach(params)
    if len(found) == 1:
        return base, found[0]
    weighted = []
    for adapters, strength in zip(found, (0.25, 0.75), strict=True):
        scaled = lambda path, x, s=strength: x * s if path.endswith("/scale") else x  # noqa: E731
        weighted.append(tree.map_with_path(scaled, adapters))
    return lora.merge(base, weighted[0]), weighted[1]


@pytest.mark.slow
def test_adapters_begin_as_nothing(base, pictures):
    losses = {}
    for name, changes in {
        "none": {"lora.rank": 0},
        "dora": {"lora.dora": True},
        "pissa": {"lora.method": "pissa"},
    }.items():
        setup = train.Setup(make_config(base, pictures, **changes))
        batch = sharding.put_batch(setup.mesh, next(iter(setup.batches(0, pictures))))
        keys = jax.vmap(jax.random.key)(np.arange(8))
        state = setup.fresh_state()
        full = tree.merge(state.params, state.frozen, state.base)
        losses[name] = float(jax.jit(setup.task.loss)(full, batch, keys)["loss"].mean())
    np.testing.assert_allclose(losses["dora"], losses["none"], rtol=2e-5)
    np.testing.assert_allclose(losses["pissa"], losses["none"], rtol=2e-5)


@pytest.mark.slow
def test_pissa_runs_come_back_as_lora(base, pictures, tmp_path):
    train.fit(make_config(base, pictures, **{"lora.method": "pissa", "optim.lr": 1e-3}), tmp_path)
    adapters, _ = load_adapters(tmp_path)
    a = next(leaf for path, leaf in tree.flatten(adapters).items() if path.endswith("/a"))
    assert a.shape[-1] == 2 * RANK["lora.rank"]  # what was trained, less what it began with
    jdiff.pipeline(tmp_path)("a red fox", **QUICK)


@pytest.mark.slow
def test_dropout_and_lora_plus_train(base, pictures):
    plain = train.Setup(make_config(base, pictures))
    batch = sharding.put_batch(plain.mesh, next(iter(plain.batches(0, pictures))))
    moved = {}
    for ratio in (1.0, 4.0):
        setup = train.Setup(make_config(base, pictures, **{"lora.plus_ratio": ratio}))
        moved[ratio] = tree.flatten(setup.step(setup.fresh_state(), batch)[0].params)
    for path, leaf in moved[4.0].items():
        factor = 4.0 if path.endswith("/b") else 1.0
        start = 0.0 if path.endswith("/b") else leaf
        np.testing.assert_allclose(leaf - start, factor * (moved[1.0][path] - start), atol=1e-5, err_msg=path)
    config = make_config(base, pictures, **{"lora.dropout": 0.5, "lora.method": "pissa"})
    setup = train.Setup(config)
    _, dropped = setup.step(setup.fresh_state(), batch)
    _, whole = plain.step(plain.fresh_state(), batch)
    assert np.isfinite(dropped["loss"]) and dropped["loss"] != whole["loss"]


@pytest.mark.runs
def test_dit_trains_adapters(image_folder, tmp_path):
    config = configs.default()
    values = {
        **{"model.depth": 2, "model.width": 32, "model.heads": 2, "data.image_size": 8, "batch_size": 8},
        **{"data.name": "imagefolder", "data.path": str(image_folder), "total_steps": 2, "log.tensorboard": False},
        **{"sample.steps": 2, "sample.count": 2, "checkpoint_every": 2, "sample_every": 2},
    }
    config.update_from_flattened_dict(values)
    train.fit(config, tmp_path / "base")
    config.update_from_flattened_dict(
        {**RANK, "init_from": str(tmp_path / "base"), "lora.targets": ("all-linear@3/6",)}
    )
    train.fit(config, tmp_path / "lora")
    arrays, _, _ = state_of(tmp_path / "lora", 2)
    assert arrays["params/lora/dit/blocks/attn/qkv/kernel/a"] == "float32[2,32,3]"
    pipe = jdiff.pipeline(tmp_path / "lora")
    assert pipe([0, 1], steps=2).shape == (2, 8, 8, 3)


def test_rules_are_read():
    settings = configs.default().lora
    settings.update(rank=4, alpha=8.0, targets=("attn", "conv@2", ".*/proj_in/kernel@16/1"))
    assert parse_rules(settings) == [
        *(lora.Rule("attn", 4, 8.0), lora.Rule("conv", 2, None), lora.Rule(".*/proj_in/kernel", 16, 1.0)),
    ]
    settings.targets = ("attn@two",)
    with pytest.raises(ValueError, match=r"lora\.targets='attn@two': write PATTERN"):
        parse_rules(settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_from": None}, r"init_from is missing|text\.train=false without init_from"),
        ({"lora.targets": ("atn",)}, "rule 'atn' matches no kernel.*did you mean 'attn'"),
        ({"lora.targets": ("attn@0",)}, "rank 0; it must be at least 1"),
        ({"vae.path": "elsewhere"}, r"vae\.path=elsewhere does not go with lora\.rank"),
    ],
)
def test_a_mistake_is_one_line(base, pictures, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        train.Setup(make_config(base, pictures, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_autoencoder_trains_adapters(base, image_folder, tmp_path):
    config = configs.default("autoencoder")
    values = {
        **{"init_from": str(base / "vae"), "data.name": "imagefolder", "data.path": str(image_folder), "batch_size": 8},
        **{"data.image_size": 32, "heldout.path": str(image_folder), "heldout.count": 8, "sample.count": 4},
        **{"total_steps": 2, "checkpoint_every": 2, "sample_every": 2, "log.tensorboard": False, "optim.lr": 1e-3},
        **{"lora.rank": 2, "lora.targets": ("attn", "conv"), "gan.start": 2},
    }
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=r"gan\.start=2: adapters are trained without a discriminator"):
        train.Setup(config)
    config.gan.weight = 0.0
    train.fit(config, tmp_path)
    arrays, _, meta = state_of(tmp_path, 2)
    assert {path.rsplit("/", 1)[-1] for path in arrays if path.startswith("params/")} == {"a", "b"}
    assert set(meta["lora"]["base"]) == {"vae"}
    vae, params = jdiff.load(tmp_path)
    _, before = jdiff.load(base / "vae")
    decode = lambda p: np.asarray(vae.apply({"params": p}, np.ones((1, 8, 8, 4), np.float32), method="decode"))  # noqa: E731
    assert 0 < np.abs(decode(params) - decode(before)).max() < 0.5


def test_a_classifier_has_no_adapters(base):
    config = configs.default("classifier")
    config.update_from_flattened_dict({"lora.rank": 2, "batch_size": 8, "data.image_size": 16})
    with pytest.raises(ValueError, match=r"adapters of task='classifier' cannot be trained"):
        train.Setup(config)
