"""tools/lora.py as users run it: every verb, what it prints, and errors in one line."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert_tool import WITHOUT_TORCH

from jdiff import loading, lora, models, tree
from jdiff.convert import bundle, dit, engine, export
from jdiff.convert import lora as files
from jdiff.pipelines.loras import split_scale

TOOL = Path(__file__).parent.parent / "tools" / "lora.py"


@pytest.fixture(scope="module")
def tool():
    """The script's namespace; run as a process in `test_it_runs_without_pytorch`."""
    return runpy.run_path(str(TOOL))


@pytest.fixture
def run(tool, capsys, monkeypatch):
    """Runs a command line, and returns what it printed."""

    def run(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, args)])
        assert tool["main"]() == code, capsys.readouterr()
        printed = capsys.readouterr()
        if code:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err if code else printed.out

    return run


def random_params(module, seed=0):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), engine.shapes(module))
    if type(module).__name__ == "DiT":
        params["pos_embed"] = dit.derived(module, "pos_embed")
    return params


@pytest.fixture(scope="module")
def modules():
    unet = {"block_out_channels": (32, 64), "attention": (True, False), "heads": (4, 4), "layers_per_block": 1}
    text = {"vocab_size": 99, "width": 32, "hidden": 48, "layers": 2, "heads": 4, "max_length": 7}
    return {
        "unet": models.create("sd15/unet", cross_attention_dim=32, **unet),
        "text": models.create("sd15/text", **text),
        "dit": models.create("DiT-S/2", image_size=8, num_classes=5, width=48, depth=2, heads=3),
    }


@pytest.fixture(scope="module")
def bases(modules, tmp_path_factory):
    """{"sd": a small Stable Diffusion without its autoencoder, "dit": a small DiT}, each (file, its parameters by model)."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name, parts, to in (("sd.safetensors", ("unet", "text"), "compvis"), ("dit.pt", ("dit",), "dit")):
        params = {part: random_params(modules[part], i) for i, part in enumerate(parts)}
        export.write(bundle.from_models({part: (modules[part], params[part]) for part in parts}), folder / name, to)
        found[name.partition(".")[0]] = (folder / name, params)
    return found


def adapters(module, rank=3, pattern="all", seed=0, params=None):
    """Random adapters of every kernel that the pattern matches; DoRA of those parameters when they are given."""
    rng, made = np.random.default_rng(seed), {}
    for path in lora.targets(engine.shapes(module), [lora.Rule(pattern, rank)]):
        shape = tree.flatten(engine.shapes(module))[path].shape
        stack = shape[: len(shape) % 2]
        a, b = rng.normal(size=(*shape[:-1], rank)) / 9, rng.normal(size=(*stack, rank, shape[-1])) / 3
        made[path] = {"a": a, "b": b, "scale": np.full(stack, 0.5)}
        if params is not None:
            made[path]["magnitude"] = 2 + rng.random((*stack, shape[-1]))
        made[path] = {name: np.asarray(value, np.float32) for name, value in made[path].items()}
    return tree.nested(made)


@pytest.fixture(scope="module")
def style(modules, tmp_path_factory):
    """A kohya file for the small Stable Diffusion, and its adapters."""
    found = {name: adapters(modules[name], seed=i) for i, name in enumerate(("unet", "text"))}
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    files.write(found, modules, file, "kohya", metadata={"ss_tag": "fox"})
    return file, found


def arrays(file):
    """A checkpoint's parameters, by model."""
    return {name: jax.tree.map(np.asarray, part.params) for name, part in bundle.read(file).parts.items()}


def assert_near(one, other, atol=1e-5):
    one, other = tree.flatten(one), tree.flatten(other)
    assert list(one) == list(other)
    for path, array in one.items():
        np.testing.assert_allclose(array, other[path], atol=atol, err_msg=path)


def in_numpy(params, adapters, strength=1.0):
    """W + strength * a scale b, for one scale a layer."""
    flat = dict(tree.flatten(params))
    for path, one in lora.by_path(adapters).items():
        stack = one["b"].shape[:-2]
        scaled = one["a"].reshape(*stack, -1, one["a"].shape[-1]) * one["scale"].reshape(*stack, 1, 1)
        flat[path] = flat[path] + strength * (scaled @ one["b"]).reshape(flat[path].shape)
    return jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))


def test_it_runs_without_pytorch(bases, style, tmp_path):
    """As a process where PyTorch and its libraries cannot be imported."""
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCH,
        str(TOOL),
        "convert",
        str(style[0]),
        str(tmp_path / "peft"),
        "--to",
        "peft",
    ]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--base", str(bases["sd"][0])], capture_output=True, text=True, env=settings, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["text_encoder", "unet"]
    done = subprocess.run([*command, "--base", "nothing"], capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_info_says_what_a_file_is(run, bases, style):
    file, found = style
    said = run("info", file, "--base", bases["sd"][0])
    count = {name: len(lora.by_path(part)) for name, part in found.items()}
    total = 3 * sum(count.values())
    parameters = sum(lora.count(part) for part in found.values())
    assert (
        f"LoRA in kohya's format, {sum(count.values())} adapters (text {count['text']}, unet {count['unet']})" in said
    )
    assert f"rank 3, alpha 1.5, float32, {parameters:,} parameters, {4 * parameters / 1e6:.2f} MB" in said
    assert f"{total} of {total} arrays fit {bases['sd'][0]}" in said and "ss_tag: fox" in said
    said = run("info", file)
    matched = int(re.search(r"(\d+) of \d+ arrays fit Stable Diffusion 1\.5", said)[1])
    assert matched < total and "is for another model" in said and "give --base" in said


def test_stable_diffusions_names_need_no_base(run, tmp_path):
    """Of which CompVis' become diffusers'."""
    made, key = {}, "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    made[f"{key}.lora_down.weight"], made[f"{key}.lora_up.weight"] = (
        np.ones((2, 320), np.float16),
        np.ones((320, 2), np.float16),
    )
    save_file(made, tmp_path / "a.safetensors", {"ss_tag": "red\x1b[31m"})
    assert "red [31m" in run("info", tmp_path / "a.safetensors")
    assert "2 of 2 arrays fit Stable Diffusion 1.5" in run("info", tmp_path / "a.safetensors")
    run("convert", tmp_path / "a.safetensors", tmp_path / "b", "--to", "diffusers", "--dtype", "bf16")
    names = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    assert {f"{name.rpartition('.lora_')[0]} {array.dtype}" for name, array in names.items()} == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q bfloat16"
    }


@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya"])
def test_formats_become_one_another(to, run, modules, bases, style, tmp_path):
    dest = tmp_path / ("a.safetensors" if to == "kohya" else "a")
    said = run("convert", style[0], dest, "--to", to, "--base", bases["sd"][0])
    assert f"LoRA in {to}'s format" in said and said.count("sha256") == (2 if to == "peft" else 1)
    found = files.fit(files.read(dest), modules)
    for name, part in style[1].items():
        assert_near(dict(sorted(tree.flatten(part).items())), dict(sorted(tree.flatten(found[name]).items())), 0)
    run("convert", dest, tmp_path / "back.safetensors", "--to", "kohya", "--base", bases["sd"][0])
    before, after = load_file(style[0]), load_file(tmp_path / "back.safetensors")
    assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)
    assert files.read(tmp_path / "back.safetensors").metadata["ss_tag"] == "fox"


def test_resize_keeps_the_best_of_a_smaller_rank(run, modules, bases, style, tmp_path):
    said = run("resize", style[0], tmp_path / "a.safetensors", "--rank", 2, "--base", bases["sd"][0])
    assert "rank 3" in said and "rank 2, alpha 2" in said
    small = files.fit(files.read(tmp_path / "a.safetensors"), modules)["text"]
    for path, one in lora.by_path(style[1]["text"]).items():
        values = np.linalg.svd(one["a"] * one["scale"] @ one["b"], compute_uv=False)
        left = lora.by_path(small)[path]
        error = np.linalg.norm(one["a"] * one["scale"] @ one["b"] - left["a"] * left["scale"] @ left["b"])
        np.testing.assert_allclose(error, np.linalg.norm(values[2:]), rtol=1e-3)
    said = run("resize", style[0], tmp_path / "b.safetensors", "--rank", 3, "--base", bases["sd"][0], code=2)
    assert "no adapter has a rank above 3" in said


def test_merge_and_unmerge(run, modules, bases, style, tmp_path):
    base, params = bases["sd"]
    other = {"text": adapters(modules["text"], rank=1, pattern="attn", seed=9)}
    files.write(other, modules, tmp_path / "other", "diffusers")
    said = run("merge", base, f"{style[0]}:0.8", tmp_path / "other", tmp_path / "merged.safetensors")
    assert "arrays fit" in said and "kernels changed" in said
    merged = arrays(tmp_path / "merged.safetensors")
    expected = {name: in_numpy(params[name], part, 0.8) for name, part in style[1].items()}
    expected["text"] = in_numpy(expected["text"], other["text"])
    for name, part in expected.items():
        assert_near(merged[name], part)
    run(
        "unmerge",
        tmp_path / "merged.safetensors",
        tmp_path / "other",
        f"{style[0]}:0.8",
        tmp_path / "again.safetensors",
    )
    for name, part in arrays(tmp_path / "again.safetensors").items():
        assert_near(part, params[name], 1e-5)


def test_a_dits_stacked_and_fused_kernels_are_merged(run, modules, bases, tmp_path):
    base, params = bases["dit"]
    found = adapters(modules["dit"], pattern="attn+mlp")
    files.write({"dit": found}, modules, tmp_path / "lora", "peft")
    run("merge", base, f"{tmp_path / 'lora'}:-0.5", tmp_path / "merged.pt")
    assert_near(arrays(tmp_path / "merged.pt")["dit"], in_numpy(params["dit"], found, -0.5))


def test_dora_is_relative_to_the_base(run, modules, bases, tmp_path):
    """It comes first whatever the order; two are refused, and so is taking one out."""
    base, params = bases["sd"]
    plain, dora = (
        adapters(modules["text"], seed=3),
        adapters(modules["text"], seed=4, pattern="attn", params=params["text"]),
    )
    for name, part in (("plain", plain), ("dora", dora)):
        files.write({"text": part}, modules, tmp_path / name, "peft")
    run("merge", base, tmp_path / "plain", tmp_path / "dora", tmp_path / "merged.safetensors")
    expected = in_numpy(jax.tree.map(np.asarray, lora.merge(params["text"], dora)), plain)
    assert_near(arrays(tmp_path / "merged.safetensors")["text"], expected, 1e-4)
    said = run("merge", base, tmp_path / "dora", tmp_path / "dora", tmp_path / "twice.safetensors", code=2)
    assert "two DoRAs are relative to the same kernel 'layers_0/" in said
    said = run("unmerge", tmp_path / "merged.safetensors", tmp_path / "dora", tmp_path / "x.safetensors", code=2)
    assert "layers_0/self_attn/" in said and "is DoRA" in said


@pytest.mark.runs
def test_extract_takes_the_difference_of_two_models(run, modules, bases, style, tmp_path):
    base, params = bases["sd"]
    changed = {**params, "unet": in_numpy(params["unet"], style[1]["unet"])}
    changed["unet"]["conv_norm_out"] = jax.tree.map(lambda x: x + 1, changed["unet"]["conv_norm_out"])
    parts = {name: (modules[name], changed[name]) for name in params}
    export.write(bundle.from_models(parts), tmp_path / "tuned.safetensors", "compvis")
    said = run("extract", base, tmp_path / "tuned.safetensors", tmp_path / "a.safetensors", "--rank", 3)
    assert "100.0% of a kernel's squared change explained, 100.0% at least" in said
    assert "2 arrays changed that no adapter reaches: unet/conv_norm_out/" in said and "in kohya's format" in said
    run("merge", base, tmp_path / "a.safetensors", tmp_path / "merged.safetensors")
    changed["unet"]["conv_norm_out"] = params["unet"]["conv_norm_out"]
    for name, part in arrays(tmp_path / "merged.safetensors").items():
        assert_near(part, changed[name], 1e-4)
    said = run(
        "extract", base, tmp_path / "tuned.safetensors", tmp_path / "b", "--rank", 1, "--to", "peft", "--dtype", "fp16"
    )
    share = float(re.search(r"([\d.]+)% at least", said)[1])
    assert 10 < share < 95 and "rank 1, alpha 1, float16" in said
    assert "differ in no kernel" in run("extract", base, base, tmp_path / "c", "--rank", 1, code=2)
    assert "not of the same models" in run("extract", base, bases["dit"][0], tmp_path / "c", "--rank", 1, code=2)


def test_a_run_is_a_base(run, modules, bases, tmp_path, monkeypatch):
    """Through `loading.load_run`, with its model's own record."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    params = bases["dit"][1]["dit"]
    monkeypatch.setattr(
        loading, "load_run", lambda path, weights="ema": ({"dit": (modules["dit"], params)}, {"main": "dit"})
    )
    found = adapters(modules["dit"], pattern="attn")
    files.write({"dit": found}, modules, tmp_path / "lora", "peft")
    assert "the format None" in run("merge", tmp_path / "run", tmp_path / "lora", tmp_path / "merged.pt", code=2)
    run("merge", tmp_path / "run", tmp_path / "lora", tmp_path / "merged.pt", "--to", "dit")
    assert_near(arrays(tmp_path / "merged.pt")["dit"], in_numpy(params, found))


def test_a_lora_run_is_a_lora(run, modules, bases, style, tmp_path, monkeypatch):
    """Through `loading.load_adapters`; and it is no base."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    meta = {
        "models": {name: models.describe(modules[name]) for name in style[1]},
        "lora": {"base": {}},
        "config": {"init_from": "sd"},
    }
    monkeypatch.setattr(loading, "load_adapters", lambda path: (style[1], meta))
    monkeypatch.setattr(loading, "load_run", lambda path, weights="ema": ({}, meta))
    said = run("convert", tmp_path / "run", tmp_path / "a.safetensors", "--to", "kohya")
    assert re.search(r"(\d+) of \1 arrays fit its base", said)
    before, after = load_file(style[0]), load_file(tmp_path / "a.safetensors")
    assert set(before) == set(after) and all(np.array_equal(before[name], after[name]) for name in before)
    run("merge", bases["sd"][0], tmp_path / "run", tmp_path / "merged.safetensors")
    assert_near(arrays(tmp_path / "merged.safetensors")["text"], in_numpy(bases["sd"][1]["text"], style[1]["text"]))
    meta["lora"]["base"] = {"text": "another"}
    said = run("merge", bases["sd"][0], tmp_path / "run", tmp_path / "x.safetensors", code=2)
    assert "holds another text than the adapters were trained on" in said
    run("unmerge", tmp_path / "merged.safetensors", tmp_path / "run", tmp_path / "again.safetensors")
    assert "give its base, sd" in run("merge", tmp_path / "run", style[0], tmp_path / "x", code=2)


def test_what_goes_wrong_is_said_in_a_line(run, bases, style, tmp_path):
    base = bases["sd"][0]
    save_file({"emb_params": np.ones((2, 768), np.float32)}, tmp_path / "words.safetensors")
    (tmp_path / "there").mkdir()
    cases = (
        (("info", tmp_path / "no.safetensors"), "does not exist"),
        (("info", tmp_path / "words.safetensors"), "textual inversion"),
        (("info", base), "whole checkpoint"),
        (("merge", tmp_path / "no", style[0], tmp_path / "x"), "does not exist"),
        (("merge", base, style[0], tmp_path / "there"), "exists"),
        (
            ("merge", bases["dit"][0], style[0], tmp_path / "x"),
            "adapters are of a unet, and the models given are ['dit']",
        ),
        (("convert", style[0], tmp_path / "x", "--to", "peft"), "arrays fit: "),
        (("convert", style[0], tmp_path / "x", "--to", "kohya", "--base", base), "a file NAME.safetensors"),
    )
    for args, message in cases:
        assert message in run(*args, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there", "words.safetensors"]
    with pytest.raises(SystemExit) as usage:
        run("merge", base)
    assert usage.value.code == 2


def test_scales_are_told_from_paths(tmp_path):
    (tmp_path / "a:0.5").touch()
    assert split_scale("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert split_scale("a.safetensors:-1e-1") == ("a.safetensors", -0.1)
    assert split_scale("C:/a.safetensors") == ("C:/a.safetensors", 1.0)
    assert split_scale(str(tmp_path / "a:0.5")) == (str(tmp_path / "a:0.5"), 1.0)
