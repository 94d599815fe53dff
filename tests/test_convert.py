"""Checkpoints of every format come back byte for byte, open in diffusers and transformers, and nothing wrong is let in."""

import argparse
import collections
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils as peer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import jdiff
from jdiff import convert, models, sharding, tree
from jdiff.convert import bundle, engine, export
from jdiff.convert.engine import Naming
from jdiff.diffusion.schedulers import STABLE_DIFFUSION_V1
from jdiff.tokens import Tokenizer

DIT = {"image_size": 12, "channels": 3, "num_classes": 5, "width": 60, "depth": 3, "heads": 3}
UNET = {
    "block_out_channels": (32, 96, 64),
    "norm_num_groups": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
SCHEDULE = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar", "scale_factor")


def random_like(state, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return {name: (0.05 * torch.randn(x.shape, generator=rng)).to(dtype) for name, x in state.items()}


def official_dit(seed=0, dtype=torch.float32, **changes):
    """A state dict with the official repository's names and layouts, written down here by hand."""
    s = {**DIT, "patch_size": 2, **changes}
    D, P, C, L = s["width"], s["patch_size"], s["channels"], (s["image_size"] // s["patch_size"]) ** 2
    shapes = {"pos_embed": (1, L, D), "x_embedder.proj.weight": (D, C, P, P), "x_embedder.proj.bias": (D,)}
    shapes |= {"y_embedder.embedding_table.weight": (s["num_classes"] + 1, D)}
    linears = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "final_layer.linear": (2 * C * P * P, D)}
    linears |= {"final_layer.adaLN_modulation.1": (2 * D, D)}
    for i in range(s["depth"]):
        linears |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D)}
        linears |= {f"blocks.{i}.mlp.fc1": (4 * D, D), f"blocks.{i}.mlp.fc2": (D, 4 * D)}
        linears |= {f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return random_like({name: torch.empty(shape) for name, shape in shapes.items()}, seed, dtype)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A tokenizer's folder."""
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    captions = ["a red fox", "a blue bird on a tree", "two brown dogs and a cat"]
    Tokenizer.train(captions, vocab_size=600, max_length=16).save(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(words):
    """A small Stable Diffusion of diffusers with random weights."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(words)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def folder(pipeline, tmp_path_factory):
    """That pipeline as diffusers saves it."""
    path = tmp_path_factory.mktemp("sd") / "folder"
    pipeline.save_pretrained(path)
    return path


def arrays_of(path):
    """Every tensor of a file or folder, read by PyTorch's own libraries, by place and name."""
    if path.is_dir():
        return {
            f"{p.relative_to(path)}:{n}": x
            for p in sorted(path.rglob("*.safetensors"))
            for n, x in load_file(p).items()
        }
    if path.suffix == ".safetensors":
        return load_file(path)
    found = {}

    def walk(content, place):
        for name, value in content.items():
            if isinstance(value, dict):
                walk(value, f"{place}{name}/")
            elif isinstance(value, torch.Tensor):
                found[f"{place}{name}"] = value

    walk(torch.load(path, weights_only=True), "")
    return found


def assert_same(found, expected):
    """Names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        bits = [y.detach().contiguous().reshape(-1).view(torch.uint8) for y in (found[name], x)]
        assert torch.equal(*bits), name


def there_and_back(path, tmp_path, expected=None, **options):
    """Imports and exports a checkpoint as what it is."""
    found = bundle.read(path, **options)
    out = tmp_path / f"back{path.suffix}"
    report = export.write(found, out)
    assert_same(arrays_of(out), arrays_of(path) if expected is None else expected)
    assert report.arrays == len(arrays_of(out)) and report.hashes
    return found


# Byte for byte


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dit_comes_back(dtype, suffix, tmp_path):
    path = tmp_path / f"dit{suffix}"
    state = official_dit(dtype=dtype)
    torch.save(collections.OrderedDict(state), path) if suffix == ".pt" else save_file(state, path)
    found = there_and_back(path, tmp_path, heads=3)
    assert found.parts["dit"].module == models.create("DiT-S/2", **DIT)
    assert found.mapped == found.total == len(state)


def test_the_paper_s_sizes_need_no_hint(tmp_path):
    path = tmp_path / "dit.pt"
    torch.save(official_dit(width=384, depth=1), path)
    assert bundle.read(path).parts["dit"].module.heads == 6
    torch.save(official_dit(), path)
    with pytest.raises(ValueError, match="width 60 is none of the paper's"):
        bundle.read(path)


def test_a_dit_run_comes_back(tmp_path):
    """{model, ema, opt, args} of DiT's and SiT's train.py: the average is taken, and the raw parameters are kept."""
    path = tmp_path / "0400000.pt"
    raw, ema = official_dit(1), official_dit(2)
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    content = {"model": raw, "ema": ema, "opt": optimizer, "args": argparse.Namespace(model="DiT-S/2", num_classes=5)}
    torch.save(content, path)
    expected = {**{f"model/{n}": x for n, x in raw.items()}, **{f"ema/{n}": x for n, x in ema.items()}}
    found = there_and_back(path, tmp_path, expected, heads=3)
    assert any("moving average" in note for note in found.notes) and any("opt" in note for note in found.notes)
    for weights, state in (("ema", ema), ("raw", raw)):
        out = tmp_path / f"{weights}.pt"
        export.write(bundle.read(path, heads=3, weights=weights), out)
        assert_same(arrays_of(out), state)


def test_diffusers_dit_comes_back(tmp_path):
    peer_dit = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=20, in_channels=3, out_channels=6, num_layers=3, sample_size=12,
        num_embeds_ada_norm=5,
    )  # fmt: skip
    for block in peer_dit.transformer_blocks[1:]:  # the embedders are one model's, written out in every block
        block.norm1.emb.load_state_dict(peer_dit.transformer_blocks[0].norm1.emb.state_dict())
    peer_dit.save_pretrained(tmp_path / "dit")
    found = there_and_back(tmp_path / "dit", tmp_path)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["norm_eps"] == 1e-5
    export.write(found, tmp_path / "dit.pt", "dit")
    export.write(bundle.read(tmp_path / "dit.pt"), tmp_path / "again", "diffusers")
    assert_same(arrays_of(tmp_path / "again"), arrays_of(tmp_path / "dit"))


def test_copies_that_differ_are_refused(tmp_path):
    module = models.create("DiT-S/2", **DIT)
    params = from_state(module, official_dit())
    params["pos_embed"] = engine.DERIVED["DiT"](module, "pos_embed")
    arrays = convert.to_torch(module, params)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    arrays[name] = np.nextafter(arrays[name], np.inf)
    with pytest.raises(ValueError, match=rf"{name} is not its copy transformer_blocks\.0"):
        convert.from_torch(module, arrays)
    with pytest.raises(ValueError, match="pos_embed is not the fixed one"):
        convert.to_torch(module, {**params, "pos_embed": params["pos_embed"] + 1})


def from_state(module, state):
    return convert.from_torch(module, {name: x.numpy() for name, x in state.items()})


def test_a_pipeline_comes_back(folder, tmp_path):
    found = there_and_back(folder, tmp_path)
    assert list(found.parts) == ["unet", "vae", "text"]
    left, right = (
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.suffix != ".safetensors"}
        for f in (folder, tmp_path / "back")
    )
    assert set(left) | {"README.md"} == set(right)
    for name, content in left.items():
        assert json.loads(content) == json.loads(right[name]) if name.endswith(".json") else content == right[name], (
            name
        )


def test_a_dit_pipeline_comes_back(tmp_path):
    """With the labels of its model_index.json."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=20, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=5
    )
    DiTPipeline(transformer, AutoencoderKL(**VAE), DDIMScheduler()).save_pretrained(tmp_path / "dit")
    file = tmp_path / "dit" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": "tench", "1": "goldfish"}}))
    found = there_and_back(tmp_path / "dit", tmp_path)
    assert list(found.parts) == ["dit", "vae"]
    assert DiTPipeline.from_pretrained(tmp_path / "back").labels == {"tench": 0, "goldfish": 1}


@pytest.mark.parametrize("how", ["fp16", "bin", "sharded", "sharded bin"])
def test_a_component_comes_back(how, pipeline, tmp_path):
    model = pipeline.unet if how == "sharded" else pipeline.vae
    options = {"safe_serialization": "bin" not in how} | ({"max_shard_size": "300KB"} if "sharded" in how else {})
    expected = model.state_dict()
    if how == "fp16":
        model, options = AutoencoderKL(**VAE).half(), {"variant": "fp16"}
        expected = model.state_dict()
    model.save_pretrained(tmp_path / "part", **options)
    files = [p.name for p in (tmp_path / "part").iterdir()]
    assert any("fp16" in n if how == "fp16" else "index" in n if "sharded" in how else n.endswith("bin") for n in files)
    found = bundle.read(tmp_path / "part")
    export.write(found, tmp_path / "back")
    assert_same(load_file(next((tmp_path / "back").glob("*.safetensors"))), expected)
    module, params = convert.load_component(tmp_path / "part")
    jax.tree.map(np.testing.assert_array_equal, params, next(iter(found.parts.values())).params)
    assert type(module).__name__ in ("UNet", "AutoencoderKL")


def test_older_spellings_come_back(pipeline, tmp_path):
    """diffusers' VAE attention before 0.17; transformers' `text_model.` and buffers before 5."""
    pipeline.vae.save_pretrained(tmp_path / "vae")
    new = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    spelt = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, x in new.items():
        for now, then in spelt.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        old[name] = x
    assert old.keys() != new.keys()
    save_file(old, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    there_and_back(tmp_path / "vae", tmp_path)

    pipeline.text_encoder.save_pretrained(tmp_path / "text")
    state = load_file(tmp_path / "text" / "model.safetensors")
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in state.items()}
    buffers = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(prefixed | buffers, tmp_path / "text" / "pytorch_model.bin")
    (tmp_path / "text" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "back")
    found = there_and_back(
        tmp_path / "text", tmp_path, {f"model.safetensors:{n}": x for n, x in (prefixed | buffers).items()}
    )
    assert found.reasons == {"text_model.embeddings.position_ids": "a buffer: 0, 1, 2, …"}


def compvis(pipeline, tmp_path, folder):
    """The pipeline in CompVis' names, checked with diffusers' own converter."""
    export.write(bundle.read(folder), tmp_path / "sd.safetensors", "compvis")
    state = load_file(tmp_path / "sd.safetensors")
    for convert_peer, model in (
        (peer.convert_ldm_unet_checkpoint, pipeline.unet),
        (peer.convert_ldm_vae_checkpoint, pipeline.vae),
    ):
        assert_same(convert_peer(dict(state), dict(model.config)), model.state_dict())
    text = peer.convert_ldm_clip_checkpoint(dict(state))
    older = {f"text_model.{n.removeprefix('text_model.')}": x for n, x in pipeline.text_encoder.state_dict().items()}
    assert_same(text, older)
    return state


def test_compvis_names_are_those_that_diffusers_reads(pipeline, folder, words, tmp_path):
    compvis(pipeline, tmp_path, folder)
    export.write(bundle.read(tmp_path / "sd.safetensors"), tmp_path / "again", "diffusers", tokenizer=words)
    assert_same(arrays_of(tmp_path / "again"), arrays_of(folder))
    peer_pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(peer_pipe.unet) is UNet2DConditionModel


class ModelCheckpoint:
    """Stands for Lightning's class, which such files mention."""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_training_s_single_file_comes_back(suffix, pipeline, folder, tmp_path, monkeypatch):
    """With moving average, schedule tables, position ids, optimizer state and Lightning's callbacks."""
    state = compvis(pipeline, tmp_path, folder)
    average = {
        "model_ema." + "".join(name.split(".")[1:]): x + 1 for name, x in state.items() if "diffusion_model" in name
    }
    state |= average | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000, dtype=torch.int),
    }
    state |= {name: torch.rand(1000) for name in SCHEDULE}
    state |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    path = tmp_path / f"full{suffix}"
    if suffix == ".ckpt":
        monkeypatch.setattr(ModelCheckpoint, "__module__", "pytorch_lightning.callbacks.model_checkpoint")
        module = type(argparse)("pytorch_lightning.callbacks.model_checkpoint")
        module.ModelCheckpoint = ModelCheckpoint
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            "pytorch_lightning.callbacks.model_checkpoint",
        ):
            monkeypatch.setitem(__import__("sys").modules, name, module)
        callbacks = {ModelCheckpoint: {"monitor": None, "best_model_score": None, "best": np.float64(0.25)}}
        torch.save({"epoch": 3, "global_step": 470000, "state_dict": state, "callbacks": callbacks}, path)
        monkeypatch.undo()
    else:
        save_file(state, path)
    expected = {f"state_dict/{n}": x for n, x in state.items()} if suffix == ".ckpt" else state
    options = {"heads": 4}
    found = there_and_back(path, tmp_path, expected, **options)
    assert any("moving average" in note for note in found.notes)
    assert found.reasons["betas"].startswith("the noise schedule's tables")
    for weights, shift in (("ema", 1), ("raw", 0)):
        out = tmp_path / f"{weights}.safetensors"
        chosen = bundle.read(path, weights=weights, **options)
        export.write(chosen, out)
        kept = load_file(out)
        assert not any(name.startswith("model_ema") for name in kept)
        name = "model.diffusion_model.out.2.weight"
        assert torch.equal(kept[name], state[name] + shift)


def test_a_single_file_s_sizes_are_told(pipeline, folder, tmp_path):
    state = {name: x.half() for name, x in compvis(pipeline, tmp_path, folder).items()}
    kept = {name: x for name, x in state.items() if not name.startswith("cond_stage_model")}
    path = tmp_path / "civitai.safetensors"
    save_file(kept, path)
    found = there_and_back(path, tmp_path, heads=4)
    assert list(found.parts) == ["unet", "vae"]
    described = bundle.read(folder).parts
    for name in found.parts:
        assert found.parts[name].module == described[name].module
    with pytest.raises(ValueError, match="width 48 is neither SD 1"):
        bundle.read(path)
    report = export.write(found, tmp_path / "parts", "diffusers")
    assert any("no whole pipeline" in note for note in report.notes)
    UNet2DConditionModel.from_pretrained(tmp_path / "parts" / "unet")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_alone_comes_back(prefix, pipeline, folder, tmp_path):
    state = compvis(pipeline, tmp_path, folder)
    alone = {
        prefix + name.removeprefix("first_stage_model."): x
        for name, x in state.items()
        if name.startswith("first_stage_model.")
    }
    path = tmp_path / "vae.ckpt"
    torch.save({"state_dict": alone | {f"{prefix}loss.logvar": torch.zeros(())}}, path)
    found = there_and_back(path, tmp_path)
    export.write(found, tmp_path / "vae", "diffusers")
    assert_same(load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"), pipeline.vae.state_dict())
    AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_one_component_in_one_file(folder, tmp_path):
    for name in ("unet", "vae", "text_encoder"):
        path = tmp_path / f"{name}.safetensors"
        export.write(bundle.read(folder / name), path, "safetensors")
        found = there_and_back(path, tmp_path)
        (tmp_path / "back.safetensors").unlink()
        assert next(iter(found.parts.values())).module == next(iter(bundle.read(folder / name).parts.values())).module


# What is written opens elsewhere, and gives the same


def test_exported_folders_give_the_same_pictures(pipeline, folder, tmp_path):
    export.write(bundle.read(folder), tmp_path / "out")
    reread = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)

    def make(pipe):
        noise = torch.Generator().manual_seed(0)
        return pipe("a red fox", num_inference_steps=2, height=16, width=16, generator=noise, output_type="np").images

    for pipe in (pipeline, reread):
        pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(make(reread), make(pipeline), atol=1e-6)


def test_exported_dit_gives_the_same_output(tmp_path):
    module = models.create("DiT-S/2", **DIT, freq_shift=1)
    params = from_state(module, official_dit())
    params["pos_embed"] = engine.DERIVED["DiT"](module, "pos_embed")
    export.write(bundle.from_models({"dit": (module, params)}), tmp_path / "dit", "diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "dit").eval()
    rng = np.random.default_rng(0)
    x, t, y = rng.normal(size=(2, 12, 12, 3)).astype(np.float32), np.array([3, 987]), np.array([0, 5])
    ours = jax.jit(module.apply)({"params": params}, jnp.asarray(x), jnp.asarray(t), jnp.asarray(y))
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(y)).sample
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_exported_text_encoder_opens(pipeline, folder, words, tmp_path):
    compvis(pipeline, tmp_path, folder)
    export.write(bundle.read(tmp_path / "sd.safetensors"), tmp_path / "again", "diffusers", tokenizer=words)
    reread = CLIPTextModel.from_pretrained(tmp_path / "again" / "text_encoder").eval()
    ids = torch.tensor(CLIPTokenizer.from_pretrained(tmp_path / "again" / "tokenizer")("a red fox").input_ids)[None]
    with torch.no_grad():
        expected = pipeline.text_encoder.eval()(ids).last_hidden_state
        torch.testing.assert_close(reread(ids).last_hidden_state, expected)


def test_a_cast_is_asked_for(folder, tmp_path):
    export.write(bundle.read(folder / "vae"), tmp_path / "vae", dtype="bfloat16")
    found, expected = arrays_of(tmp_path / "vae"), arrays_of(folder / "vae")
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    for name, x in expected.items():
        assert torch.equal(found[name], x.to(torch.bfloat16))


# Nothing wrong comes in

MODULES = {
    "dit": (lambda: models.create("DiT-S/2", **DIT), "dit"),
    "dit of diffusers": (lambda: models.create("DiT-S/2", **DIT), "diffusers"),
    "unet": (lambda: bundle.configs.from_config({"_class_name": "UNet2DConditionModel", **UNET}), "diffusers"),
    "unet of CompVis": (lambda: bundle.configs.from_config({"_class_name": "UNet2DConditionModel", **UNET}), "compvis"),
    "vae": (lambda: bundle.configs.from_config({"_class_name": "AutoencoderKL", **VAE}), "diffusers"),
    "vae of CompVis": (lambda: bundle.configs.from_config({"_class_name": "AutoencoderKL", **VAE}), "compvis"),
    "text": (lambda: models.create("sd15/text", vocab_size=99, width=48, hidden=80, layers=2, heads=3), "diffusers"),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * kind.startswith("unet")) for kind in MODULES]
)
def test_every_mutation_of_every_array_is_refused(kind):
    make, table = MODULES[kind]
    module, naming = make(), Naming(table)
    rng = np.random.default_rng(0)
    shapes = engine.shapes(module)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    if kind == "dit of diffusers":
        params["pos_embed"] = engine.DERIVED["DiT"](module, "pos_embed")
    arrays = engine.write(module, params, naming)
    (back,), reasons = engine.read([(module, naming)], arrays)
    assert not reasons and not tree.differences(jax.tree.map(np.asarray, back), params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, back), params)

    def mutations(name, x):
        rest = {n: y for n, y in arrays.items() if n != name}
        yield "dropped", rest, name
        renamed = name.replace("weight", "wieght").replace("bias", "bais").replace("pos_embed", "pos_embde")
        yield "renamed", {**rest, renamed: x}, rf"missing: {name} \(did you mean '{renamed}'\?\)"
        yield "doubled", {**arrays, f"{name}.1": x}, f"unexpected: {name}.1"
        yield "recast", {**rest, name: x.astype(np.float16)}, f"{name} is float16"
        yield "of integers", {**rest, name: x.astype(np.int32)}, f"{name} is int32"
        yield "reshaped", {**rest, name: x.reshape(1, *x.shape)}, f"{name} has the shape"
        if x.shape != x.T.shape:
            yield "transposed", {**rest, name: x.T}, f"{name} has the shape"
        if x.size > 1:
            yield "flattened", {**rest, name: x.reshape(-1, 1, 1)}, f"{name} has the shape"

    for name, x in arrays.items():
        for what, mutated, named in mutations(name, np.asarray(x)):
            with pytest.raises(convert.ConversionError) as error:
                engine.read([(module, naming)], mutated)
            assert name in str(error.value), (what, name)
            if "(" in named:
                assert named.replace("\\", "") in str(error.value), str(error.value)


def test_mixed_dtypes_need_a_word(folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].half()
    save_file(state, file)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias is float16, not float32 .*give a dtype"):
        bundle.read(tmp_path / "vae")
    export.write(bundle.read(tmp_path / "vae", mixed=True), tmp_path / "cast", dtype=np.float32)
    assert {x.dtype for x in arrays_of(tmp_path / "cast").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no object"),
        (
            lambda f: (f / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}'),
            "FluxTransformer2DModel",
        ),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
        (lambda f: cut(f / "diffusion_pytorch_model.safetensors"), "cannot be read"),
    ],
    ids=["no config", "a list", "another model", "no weights", "cut short"],
)
def test_a_broken_component_is_named(change, message, folder, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "vae")
    change(tmp_path / "vae")
    with pytest.raises(ValueError, match=message) as error:
        bundle.read(tmp_path / "vae")
    assert str(tmp_path / "vae") in str(error.value) and "\n" not in str(error.value)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_a_lost_shard_is_named(pipeline, tmp_path):
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="300KB")
    next((tmp_path / "unet").glob("*00002-of*")).unlink()
    with pytest.raises(ValueError, match=r"lacks the shard .*00002-of"):
        bundle.read(tmp_path / "unet")


def test_what_a_format_cannot_hold_is_said(folder, tmp_path):
    found = bundle.read(folder)
    for to, message in (("dit", "holds a DiT"), ("safetensors", "holds one model"), ("onnx", "use one of diffusers")):
        with pytest.raises(ValueError, match=message):
            export.write(found, tmp_path / "x", to)
    export.write(found, tmp_path / "sd.ckpt", "compvis")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        export.write(bundle.read(tmp_path / "sd.ckpt"), tmp_path / "x", "diffusers")
    with pytest.raises(ValueError, match="exists"):
        export.write(found, tmp_path / "sd.ckpt", "compvis")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sd.ckpt"], "nothing half-written stays"


# Straight into use


def test_any_format_loads_onto_a_mesh(folder, tmp_path):
    found = bundle.read(folder)
    export.write(found, tmp_path / "sd.safetensors", "compvis")
    torch.save(official_dit(width=384, depth=2), tmp_path / "dit.pt")
    mesh = sharding.make_mesh()
    for path, kind in ((folder, "UNet"), (tmp_path / "sd.safetensors", "UNet"), (folder / "vae", "AutoencoderKL"),
                       (tmp_path / "dit.pt", "DiT")):  # fmt: skip
        module, params = jdiff.load(path, mesh=mesh)
        assert type(module).__name__ == kind
        assert not tree.differences(engine.shapes(module), params)
        assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(params))
    part = bundle.read(tmp_path / "dit.pt").parts["dit"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), params, part.params)


def test_one_file_makes_the_folder_s_picture(folder, words, tmp_path):
    export.write(bundle.read(folder), tmp_path / "sd.ckpt", "compvis")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        jdiff.pipeline(tmp_path / "sd.ckpt")
    options = {"steps": 2, "height": 16, "width": 16, "output": "np"}
    one = jdiff.pipeline(tmp_path / "sd.ckpt", tokenizer=words)("a red fox", **options)
    scheduler = {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION_V1}
    export.write(bundle.read(folder), tmp_path / "v1", scheduler=scheduler)
    np.testing.assert_array_equal(one, jdiff.pipeline(tmp_path / "v1")("a red fox", **options))


def test_an_official_dit_samples(tmp_path):
    torch.save(official_dit(width=384, depth=1), tmp_path / "dit.pt")
    pictures = jdiff.pipeline(tmp_path / "dit.pt")([0, 4], steps=2)
    assert pictures.shape == (2, 12, 12, 3) and np.isfinite(pictures).all()
