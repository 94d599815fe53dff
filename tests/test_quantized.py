"""Quantized checkpoints: written, read, sampled and adapted like any other, whole or not at all, and refused where floats are
needed."""

import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sd import make_folder

import jdiff
from jdiff import checkpoint, convert, loading, lora, models, train, tree, weights
from jdiff.convert import quantized
from jdiff.qtensor import QTensor

pytestmark = pytest.mark.usefixtures("compiled")
TOOL = "tools/quantize.py"
LABELS = {"labels": [0, 1, 1], "steps": 3, "seed": 4}
PROMPT = {"prompt": "a red fox", "steps": 3, "scheduler": "ddim", "guidance_scale": 1.0, "seed": 4, "output": "latent"}


def _fill(params):
    """What was not trained is not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(x.dtype), params)


@pytest.fixture(scope="module")
def run(class_config, tmp_path_factory):
    """A trained run of the classes ant and bee."""
    workdir = tmp_path_factory.mktemp("run") / "a"
    train.fit(class_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """DiT's .pt."""
    model = models.create("DiT-S/2", image_size=8, num_classes=3, width=64, depth=2, heads=2)
    first = jax.jit(model.init)(jax.random.key(0), *model.dummy_inputs())["params"]
    params = {**_fill(first), "pos_embed": first["pos_embed"]}
    path = tmp_path_factory.mktemp("dit") / "dit.pt"
    convert.write(convert.from_models({"dit": (model, params)}), path, "dit")
    return path


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A diffusers folder."""
    return make_folder(tmp_path_factory.mktemp("sd"), levels=1)


@pytest.fixture
def source(request):
    return request.getfixturevalue(request.param)


def _copy(path, dest, recipe="w8a8"):
    loading.save_quantized(loading.quantized(loading.open_checkpoint(path), recipe), dest)
    return dest


@pytest.mark.parametrize(
    ("source", "recipe"), [("run", "w8a8"), ("run", "w4"), ("official", "w8"), ("stable", "w8a8")], indirect=["source"]
)
def test_a_copy_is_what_quantizing_on_the_way_gives(source, recipe, tmp_path):
    """Bit by bit, arrays and pictures, which are near the original's."""
    copy = _copy(source, tmp_path / "copy", recipe)
    pipes = [jdiff.pipeline(source), jdiff.pipeline(source, quantize=recipe), jdiff.pipeline(copy)]
    (_, params), (_, again) = jdiff.load(source, quantize=recipe), jdiff.load(copy)
    assert jax.tree.structure(params) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert any(isinstance(leaf, QTensor) for leaf in weights.flatten(again).values())
    settings = PROMPT if source.is_dir() and (source / "unet").exists() else LABELS
    exact, on_the_way, copied = (pipe(**settings) for pipe in pipes)
    np.testing.assert_array_equal(on_the_way, copied)
    error = np.linalg.norm(copied - exact) / np.linalg.norm(exact)
    assert 0 < error < (0.3 if recipe == "w4" else 0.1)
    if source.name == "a":
        assert pipes[2].class_names == pipes[0].class_names == ["ant", "bee"]
    if settings is PROMPT:
        assert pipes[2].geometry == pipes[0].geometry and pipes[2].scheduler == pipes[0].scheduler


@pytest.mark.parametrize("shape", [(64, 5), (3, 64, 5), (3, 3, 64, 5)])
def test_four_bits_come_back(shape, tmp_path):
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(jnp.int4)
    packed = quantized._packed(values)
    assert packed.nbytes * 2 == values.size
    back = quantized.Unpacked(packed)
    assert back.shape == shape and back.dtype == values.dtype
    np.testing.assert_array_equal(np.asarray(back), values)


def test_bytes(run, tmp_path):
    """The files hold what `size` says, and a little header."""
    for recipe in ("w8a8", "w8", "w4"):
        opened = loading.quantized(loading.open_checkpoint(run), recipe)
        loading.save_quantized(opened, tmp_path / recipe)
        there = sum(path.stat().st_size for path in (tmp_path / recipe).glob("*.safetensors"))
        assert 0 <= there - quantized.size(opened.models) < 10_000


@pytest.mark.slow
def test_a_report_of_a_model_of_texts(commands, stable, tmp_path):
    """By prompts of one's own; a copy cannot be its own measure."""
    arguments = ("--recipe", "w8a8", "--num", 2, "--steps", 2)
    failed = commands.run(TOOL, "report", stable, *arguments)
    assert failed.returncode == 2 and "--prompt: the model in" in failed.stderr and len(failed.stderr.splitlines()) == 1
    report = commands.run(TOOL, "report", stable, *arguments, "--prompt", "a red fox")
    assert report.returncode == 0, report.stderr
    rows = {line[:9]: line.split()[3:] for line in report.stdout.splitlines() if line[:1] == "0"}
    assert len(rows) == 10 and all(0 < float(row[0]) < 1e-2 for row in rows.values())
    assert report.stdout.count("PSNR, dB") == 2 and "all of them" in report.stdout


def test_it_is_whole_or_not_there(run, tmp_path):
    opened = loading.quantized(loading.open_checkpoint(run), "w8")
    broken = mock.patch("jdiff.convert.tensors._compare", side_effect=convert.ConversionError("a broken disk"))
    with broken, pytest.raises(convert.ConversionError, match="a broken disk"):
        loading.save_quantized(opened, tmp_path / "copy")
    assert not list(tmp_path.iterdir())
    loading.save_quantized(opened, tmp_path / "copy")
    with pytest.raises(convert.ConversionError, match="copy exists: remove it"):
        loading.save_quantized(opened, tmp_path / "copy")


def _flip(copy):
    path = copy / "dit.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def _say(key, value):
    def change(copy):
        content = json.loads((copy / "quantized.json").read_text())
        del content["self"]
        content[key] = value
        (copy / "quantized.json").write_text(json.dumps({**content, "self": tree.digest(content)}))

    return change


def _swap(old, new):
    def change(copy):
        text = (copy / "quantized.json").read_text()
        assert old in text
        (copy / "quantized.json").write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "dit.safetensors is damaged: it is not what was written"),
        (lambda copy: (copy / "dit.safetensors").unlink(), "lacks dit.safetensors"),
        (lambda copy: (copy / "quantized.json").write_text("{"), "quantized.json cannot be read"),
        (_say("format", 7), "has the format 7, not 2: use jdiff"),
        (_swap("w8", "w4"), "quantized.json is damaged: it is not what was written"),
        (_say("models", {"dit": {"class": "DiT", "depth": 3, "width": 64, "heads": 2}}), "does not hold its DiT"),
        (_say("kernels", {"dit": {}}), "does not hold its DiT"),
        (_say("kernels", {}), "lacks what it should hold"),
        (_say("facts", {}), "quantized.json lacks"),
    ],
)
def test_a_damaged_copy_is_one_line(run, tmp_path, damage, said):
    copy = _copy(run, tmp_path / "copy")
    damage(copy)
    with pytest.raises(convert.ConversionError, match=said) as caught:
        jdiff.load(copy)
    assert "\n" not in str(caught.value)


def test_what_needs_floats_refuses_it(run, class_config, tmp_path):
    copy = _copy(run, tmp_path / "copy")
    config = class_config.copy_and_resolve_references()
    config.init_from = str(copy)
    calls = {
        r"init_from=.*copy is quantized \(w8a8\) and cannot be trained itself": lambda: train.Setup(
            config
        ).fresh_state(),
        "copy is quantized, and its floats are gone": lambda: convert.read(copy),
        "quantized already, by w8a8": lambda: jdiff.load(copy, quantize="w8"),
        "weights=raw: .* has one set of weights": lambda: jdiff.load(copy, weights="raw"),
        r"quantize='w9' is unknown": lambda: jdiff.pipeline(run, quantize="w9"),
    }
    for said, call in calls.items():
        with pytest.raises(ValueError, match=said):
            call()


def test_only_what_recipes_know_is_quantized(stable, tmp_path):
    with pytest.raises(ValueError, match="recipes are for dit and unet, and this is a model of vae"):
        jdiff.load(stable / "vae", quantize="w8")
    opened = loading.open_checkpoint(stable)
    unet = opened.models["unet"][1]
    adapters = {"unet": lora.init(jax.random.key(0), unet, [lora.Rule("attn", 2)])}
    params = lora.attach({"unet": unet}, adapters)
    with pytest.raises(convert.ConversionError, match="has adapters attached: merge them first"):
        quantized.write(tmp_path / "copy", {"unet": (opened.models["unet"][0], params["unet"])}, {})


@pytest.mark.runs
def test_adapters_are_trained_over_it(run, class_config, tmp_path):
    """QLoRA: the integers stay, the adapters learn, and come back onto the copy, and onto what quantizes to it; not elsewhere."""
    copy = _copy(run, tmp_path / "copy")
    config = class_config.copy_and_resolve_references()
    config.update_from_flattened_dict({"init_from": str(copy), "lora.rank": 2, "total_steps": 4, "checkpoint_every": 4})
    setup = train.Setup(config)
    base = setup.fresh_state().base
    assert {str(leaf.dtype) for path, leaf in tree.flatten(base).items() if path.endswith("qvalue")} == {"int8"}
    train.fit(config, tmp_path / "adapters")
    shutil.copytree(tmp_path / "adapters", tmp_path / "resumed")
    config.total_steps = 5
    train.fit(config, tmp_path / "resumed")
    assert checkpoint.steps(tmp_path / "resumed") == [4, 5]
    plain, adapted, again = (
        jdiff.pipeline(copy, **more)(**LABELS)
        for more in ({}, {"lora": [tmp_path / "adapters"]}, {"lora": [(tmp_path / "adapters", 0.0)]})
    )
    assert np.abs(adapted - plain).max() > 1e-3
    np.testing.assert_array_equal(again, plain)
    on_the_way = jdiff.pipeline(run, quantize="w8a8", lora=[tmp_path / "adapters"])(**LABELS)
    np.testing.assert_array_equal(on_the_way, adapted)
    np.testing.assert_array_equal(jdiff.pipeline(tmp_path / "adapters")(**LABELS), adapted)
    with pytest.raises(ValueError, match="holds another dit than the adapters were trained on"):
        jdiff.pipeline(run, lora=[tmp_path / "adapters"])


@pytest.mark.slow
def test_adapters_of_the_original_go_onto_its_copy(run, class_config, tmp_path):
    config = class_config.copy_and_resolve_references()
    config.update_from_flattened_dict({"init_from": str(run), "lora.rank": 2, "total_steps": 4, "checkpoint_every": 4})
    train.fit(config, tmp_path / "adapters")
    copy = _copy(run, tmp_path / "copy")
    pipes = [
        jdiff.pipeline(path, lora=[tmp_path / "adapters"], **more)
        for path, more in ((copy, {}), (run, {"quantize": "w8a8"}))
    ]
    np.testing.assert_array_equal(*(pipe(**LABELS) for pipe in pipes))
    np.testing.assert_array_equal(jdiff.pipeline(tmp_path / "adapters", quantize="w8a8")(**LABELS), pipes[0](**LABELS))


@pytest.mark.runs
def test_the_tool(commands, run, tmp_path):
    dry = commands.run(TOOL, run, "--recipe", "w8a8", "--dry-run")
    assert dry.returncode == 0 and "blocks/.*/kernel" in dry.stdout and "saved MB" in dry.stdout, dry.stderr
    made = commands.run(TOOL, run, tmp_path / "copy", "--recipe", "w8a8")
    assert made.returncode == 0 and "times smaller, read back and compared" in made.stdout, made.stderr
    sampled = commands.run("tools/sample.py", tmp_path / "copy", "--steps", 2, "--out", tmp_path / "grid.png")
    assert sampled.returncode == 0 and (tmp_path / "grid.png").exists(), sampled.stderr
    page = tmp_path / "page.html"
    others = ("--recipe", "w8a8", "--other", tmp_path / "copy")
    report = commands.run(TOOL, "report", run, *others, "--num", 4, "--steps", 2, "--page", page)
    assert report.returncode == 0, report.stderr
    rows = {line[:9]: line.split()[3:] for line in report.stdout.splitlines() if line[:1] == "0"}
    assert len(rows) == 10 and all(0 < float(row[0]) < 1e-2 and row[0] == row[1] for row in rows.values())
    assert "step 2" in report.stdout and "blocks/mlp/fc1 1" in report.stdout and "all of them" in page.read_text()
    exported = commands.run(TOOL, "export", tmp_path / "copy", tmp_path / "golden")
    assert exported.returncode == 0 and (tmp_path / "golden" / "index.json").exists(), exported.stderr
    for arguments, said in (
        ((run, "--recipe", "w8"), "DEST is missing"),
        ((run, tmp_path / "copy", "--recipe", "w8"), "copy exists"),
    ):
        failed = commands.run(TOOL, *arguments)
        assert failed.returncode == 2 and said in failed.stderr and len(failed.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "more"), [("w8a8-static", ()), ("w8", ("--gptq",))])
def test_a_copy_calibrated_on_data(commands, run, recipe, more, image_folder, tmp_path):
    made = commands.run(TOOL, run, tmp_path / "copy", "--recipe", recipe, "--calibrate", image_folder, *more)
    assert made.returncode == 0, made.stderr
    exact, found = (jdiff.pipeline(path)(**LABELS) for path in (run, tmp_path / "copy"))
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1


@pytest.mark.slow
def test_a_calibrated_copy(commands, run, class_config, tmp_path):
    """Static steps come back from the file; adapters of others are refused by a balanced copy, its own are not."""
    made = commands.run(
        TOOL, run, tmp_path / "copy", "--recipe", "w8a8-static", "--calibrate", 4, "--balance", "--steps", 2
    )
    assert made.returncode == 0 and "blocks/mlp/fc1/kernel: " in made.stdout, made.stderr
    _, params = jdiff.load(tmp_path / "copy")
    assert params["blocks"]["mlp"]["fc2"]["kernel"].step.shape == (2, 1)
    exact, found = (jdiff.pipeline(path)(**LABELS) for path in (run, tmp_path / "copy"))
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.1
    with pytest.raises(ValueError, match="adapters of others do not fit a balanced copy"):
        jdiff.pipeline(tmp_path / "copy", lora=["style.safetensors"])
    config = class_config.copy_and_resolve_references()
    config.update_from_flattened_dict({"init_from": str(run), "lora.rank": 2, "total_steps": 2})
    train.fit(config, tmp_path / "adapters")
    with pytest.raises(ValueError, match="holds another dit than the adapters were trained on"):
        jdiff.pipeline(tmp_path / "copy", lora=[tmp_path / "adapters"])
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        (("w8", "--balance"), "--balance needs --calibrate"),
        (("w4", "--gptq"), "--gptq needs --calibrate"),
        (("w8a8-static",), "needs --calibrate N"),
        (("w8a8-static", "--calibrate", tmp_path / "empty"), "holds no pictures"),
    ):
        failed = commands.run(TOOL, run, tmp_path / "other", "--recipe", *arguments)
        assert failed.returncode == 2 and said in failed.stderr and len(failed.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("DiT-XL/2", "dit"), ("sd15/unet", "unet")])
def test_full_sizes(commands, name, kind, tmp_path):
    """The copy's bytes, and the memory of a process that holds it, beside those of the original; a DiT's has run it too."""
    model, rng = models.create(name), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    source, copy = tmp_path / "source.safetensors", tmp_path / "copy"
    convert.write(convert.from_models({kind: (model, params)}), source, "safetensors")
    del params
    made = commands.run(TOOL, source, copy, "--recipe", "w8a8", timeout=900)
    assert made.returncode == 0, made.stderr
    files = [path.stat().st_size for path in (source, *copy.glob("*.safetensors"))]
    assert files[0] >= 3.8 * files[1]
    # not the UNet: XLA:CPU's convolutions of integers keep more memory of their own than those of floats (docs/int8.md)
    run = "jax.block_until_ready(jax.jit(model.apply)({'params': params}, *model.dummy_inputs())); "
    held = (
        f"import jax, jdiff, re, sys; model, params = jdiff.load(sys.argv[1]); {run if kind == 'dit' else ''}"
        "print(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    memory = [int(commands.run("-c", held, path, timeout=900).stdout) for path in (source, copy)]
    assert memory[0] - memory[1] > 0.95 * (files[0] - files[1]) / 1024
