"""Adapters written by peft, diffusers and kohya's scripts are read to the last array, and theirs read ours."""

import copy
import hashlib
import io
import json
import math
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils as peer
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from test_convert_hostile import GLOBALS, archive, call
from transformers import CLIPTextConfig, CLIPTextModel

from jdiff import convert, lora, models, tree
from jdiff.convert import ConversionError, lora_cells, lora_config, lora_names, lora_places
from jdiff.convert import lora as files
from jdiff.convert.engine import Naming

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 7,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
# products, 1x1 and 3x3 convolutions, a stride, and a module of every kind of name
ON_UNET = (
    "to_q",
    "to_out.0",
    "ff.net.0.proj",
    "conv1",
    "conv_shortcut",
    "proj_in",
    "conv_in",
    "downsamplers.0.conv",
    "linear_1",
)
ON_TEXT = ("q_proj", "out_proj", "fc1")
KINDS = {
    "lora": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"to_q": 2, r"attn2\.to_out.0": 5, "q_proj": 1},
        "alpha_pattern": {"conv1": 1.5, "^conv_in": 3, "1.mlp.fc1": 0.3},
    },
    "dora": {"r": 3, "lora_alpha": 7, "use_dora": True},
}


@pytest.fixture(scope="module")
def bases():
    """Models of diffusers and transformers with random weights, never changed."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(**DIT)
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    found = {"unet": UNet2DConditionModel(**UNET), "text": CLIPTextModel(CLIPTextConfig(**TEXT)), "dit": dit}
    return {name: model.eval() for name, model in found.items()}


@pytest.fixture(scope="module")
def modules(bases):
    """Ours, of the same sizes."""
    dit = {"image_size": 8, "num_classes": 5, "width": 32, "depth": 3, "heads": 2, "freq_shift": 1}
    return {
        "unet": models.from_config({**bases["unet"].config, "_class_name": "UNet2DConditionModel"}),
        "text": models.from_config({**bases["text"].config.to_dict(), "architectures": ["CLIPTextModel"]}),
        "dit": models.create("DiT-S/2", **dit),
    }


@pytest.fixture(scope="module")
def params(bases, modules):
    return {
        name: convert.from_torch(
            modules[name], {k: v.numpy() for k, v in model.state_dict().items() if "pos_embed.pos" not in k}
        )
        for name, model in bases.items()
    }


def adapted(base, targets, **config):
    """A PeftModel of a copy, all of its adapters random, and far enough from nothing to be seen."""
    torch.manual_seed(1)
    targets = targets if isinstance(targets, str) else list(targets)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=targets, init_lora_weights=False, **config))
    for name, value in model.named_parameters():
        if "lora_magnitude_vector" in name:
            value.data *= 0.5 + torch.rand_like(value)
    return model.eval()


def merged_by_peft(model):
    """All weights with peft's adapters in them, under the base's names."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    plain = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    return {name.replace(".base_layer", ""): value.numpy() for name, value in plain.items() if "lora_" not in name}


def merged(module, params, adapters, table="diffusers"):
    """All weights with our adapters in them, by the definition of what an adapter means."""
    flat = dict(tree.flatten(params))
    for path, one in lora.by_path(adapters).items():
        w, a, b = flat[path], one["a"], one["b"]
        stack = w.shape[: w.ndim % 2]
        scale = one["scale"][..., None] if one["scale"].shape == stack else one["scale"]
        w = w + ((a.reshape(*stack, -1, a.shape[-1]) * scale[..., None, :]) @ b).reshape(w.shape)
        if "magnitude" in one:
            norm = np.linalg.norm(w.reshape(*stack, -1, w.shape[-1]), axis=-2)
            w *= (one["magnitude"] / norm).reshape(*stack, *(1,) * (w.ndim - len(stack) - 1), -1)
        flat[path] = w
    return convert.to_torch(module, jax.tree.unflatten(jax.tree.structure(params), list(flat.values())), table)


def assert_merges(module, params, adapters, expected):
    found = merged(module, params, adapters)
    base = convert.to_torch(module, params)
    assert set(found) <= set(expected)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, rtol=1e-4, err_msg=name)
    assert any(np.abs(array - base[name]).max() > 1e-2 for name, array in found.items())


def assert_alike(one, other):
    """Two PeftModels, or models of diffusers with adapters, are the same once merged."""
    one, other = merged_by_peft(one), merged_by_peft(other)
    assert set(one) == set(other)
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], atol=1e-5, err_msg=name)


def assert_loaded(model, expected):
    """A model of a pipeline has a PeftModel's adapters: none is missing or left over, all bits equal."""
    expected, found = (
        strip(get_peft_model_state_dict(expected)),
        get_peft_model_state_dict(model, adapter_name="default_0"),
    )
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


def assert_same_arrays(one, other):
    """Names, dtypes, shapes and bits."""
    one, other = load_file(one), load_file(other)
    assert set(one) == set(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype and array.shape == other[name].shape, name
        assert torch.equal(array, other[name]), name


def assert_equal(one, other):
    one, other = tree.flatten(one), tree.flatten(other)
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other[name]), name)


def pipeline(bases):
    """A Stable Diffusion of copies, for loading adapters into."""
    return StableDiffusionPipeline(
        None,
        copy.deepcopy(bases["text"]),
        None,
        copy.deepcopy(bases["unet"]),
        None,
        None,
        None,
        requires_safety_checker=False,
    )


def fit(path, modules, *names, dtype=np.float32):
    """The adapters of a file in which every array has to land."""
    file = files.read(path)
    chosen = {name: modules[name] for name in names or ("unet", "text")}
    landing = files.land(file, chosen)
    assert (landing.matched, landing.problems) == (landing.total, ())
    return files.fit(file, chosen, dtype)


# peft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["unet", "text"])
def test_pefts_folder_is_read_and_written_back(name, kind, bases, modules, params, tmp_path):
    """Also: peft opens what was written, with no array missing or left over."""
    targets = ON_UNET if name == "unet" else (*ON_TEXT, "token_embedding")
    model = adapted(bases[name], targets, **KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    found = fit(tmp_path / "theirs", modules, name)
    assert_merges(modules[name], params[name], found[name], merged_by_peft(model))

    files.write(found, modules, tmp_path / "ours", "peft")
    assert_same_arrays(*(tmp_path / who / "adapter_model.safetensors" for who in ("theirs", "ours")))
    opened = PeftModel.from_pretrained(copy.deepcopy(bases[name]), tmp_path / "ours")
    expected, reread = get_peft_model_state_dict(model), get_peft_model_state_dict(opened)
    assert set(reread) == set(expected) and all(torch.equal(reread[key], expected[key]) for key in expected)
    assert_alike(opened, model)
    assert_equal(fit(tmp_path / "ours", modules, name), found)


def test_older_spellings_of_pefts_are_read(bases, modules, tmp_path):
    """With the adapter's name in them, a magnitude with `.weight`, and as a pickle."""
    model = adapted(bases["text"], (*ON_TEXT, "token_embedding"), **KINDS["dora"])
    model.save_pretrained(tmp_path / "now")
    state = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert {name.split("lora_")[1] for name in state} >= {
        "magnitude_vector.default.weight",
        "embedding_A.default",
        "A.default.weight",
    }
    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "adapter_config.json").write_bytes((tmp_path / "now" / "adapter_config.json").read_bytes())
    torch.save(state, tmp_path / "then" / "adapter_model.bin")
    assert_equal(fit(tmp_path / "then", modules, "text"), fit(tmp_path / "now", modules, "text"))
    with_prefix = {f"base_model.model.text_model.{n.removeprefix('base_model.model.')}": v for n, v in state.items()}
    torch.save(with_prefix, tmp_path / "then" / "adapter_model.bin")  # transformers before 5
    assert_equal(fit(tmp_path / "then", modules, "text"), fit(tmp_path / "now", modules, "text"))


def test_pefts_patterns_are_looked_up_as_peft_does():
    from peft.utils.other import get_pattern_key

    names = ("down.0.attn1.to_q", "attn1.to_q", "to_q", "0.attn10.to_q", "down.0.attn1.to_q.x", "mid.attn1.to_k")
    patterns = {"to_q": 1, "attn1.to_q": 2, r"attn\d+\.to_k": 3, "^to_q": 4, "down.0.attn1.to_q": 5}
    for order in (patterns, dict(reversed(patterns.items()))):
        settings = lora_config.Settings(8, 8.0, order, {}, False, False)
        for name in names:
            assert settings.of(name)[0] == order.get(get_pattern_key(order.keys(), name), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["conv_out"]}, r"modules_to_save=\['conv_out'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base of its own"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"of_next_year": {"x": 1}}, "of_next_year"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"r": 4}, "rank 3, and its settings say 4"),
        ({"use_dora": True}, "lacks magnitudes"),
        ({"rank_pattern": {"(a+)+b": 3}}, "too intricate"),
        ({"rank_pattern": {"(": 3}}, "no regex"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": 1e300}, "is scaled by .*e[+]299"),
        ({"lora_alpha": 1e-60}, "is scaled by .*e-61"),
        ({"use_rslora": "yes"}, "use_rslora=yes, which is neither"),
    ],
)
def test_settings_that_change_the_numbers_are_not_passed_over(change, message, bases, tmp_path):
    adapted(bases["text"], ["q_proj"], **KINDS["lora"]).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConversionError, match=message) as error:
        files.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pefts_file_without_its_settings_is_refused(bases, tmp_path):
    adapted(bases["text"], ["q_proj"], **KINDS["lora"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConversionError, match=r"lacks adapter_config\.json"):
        files.read(tmp_path / "adapter_model.safetensors")


# diffusers


def by_diffusers(bases, path, kind):
    """A pipeline's adapters as diffusers saves them; returns the two PeftModels."""
    made = {name: adapted(bases[name], on, **KINDS[kind]) for name, on in (("unet", ON_UNET), ("text", ON_TEXT))}
    layers = {name: strip(get_peft_model_state_dict(model)) for name, model in made.items()}
    configs = {name: model.peft_config["default"].to_dict() for name, model in made.items()}
    StableDiffusionPipeline.save_lora_weights(
        path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text"],
    )
    return made


def strip(state):
    return {name.removeprefix("base_model.model."): value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_file_is_read_and_written_back(kind, bases, modules, params, tmp_path):
    made = by_diffusers(bases, tmp_path / "theirs", kind)
    found = fit(tmp_path / "theirs", modules)
    for name, model in made.items():
        assert_merges(modules[name], params[name], found[name], merged_by_peft(model))

    file = files.read(tmp_path / "theirs")
    spelt = files.land(file, modules).namings  # transformers 5 has no `text_model.`
    files.write(fit(tmp_path / "theirs", modules, dtype=None), modules, tmp_path / "same", "diffusers", namings=spelt)
    theirs, ours = (load_file(tmp_path / who / "pytorch_lora_weights.safetensors") for who in ("theirs", "same"))
    if (
        kind == "dora"
    ):  # diffusers does not read its own: transformers wants `.weight` behind a text encoder's magnitudes
        ours = {name.replace("_vector.weight", "_vector"): value for name, value in ours.items()}
    assert set(theirs) == set(ours)
    assert all(theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name]) for name in theirs)

    files.write(found, modules, tmp_path / "one.safetensors", "diffusers")
    pipe = pipeline(bases)
    pipe.load_lora_weights(tmp_path / "one.safetensors")
    for name, loaded in (("unet", pipe.unet), ("text", pipe.text_encoder)):
        assert_loaded(loaded, made[name])
        assert_alike(loaded, made[name])


def oldest(state):
    """diffusers before 0.18: attention's processors held the adapters, under the same names in both models."""
    made = {}
    for name, value in state.items():
        module, _, end = name.partition(".lora_")
        parent, _, last = module.removesuffix(".0").rpartition(".")
        last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last, last)
        parent = f"{parent}.processor" if "attn1" in parent or "attn2" in parent else parent
        made[f"{parent}.{last}_lora.{'down' if end.startswith('A') else 'up'}.weight"] = value
    return made


def middle(state):
    """diffusers 0.18 and after."""
    return {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for name, value in state.items()}


GENERATIONS = ("present", "without metadata", "mixed", "lora.down", "oldest", "oldest, bare")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_diffusers_older_spellings_mean_to_us_what_they_mean_to_diffusers(generation, bases, modules, params, tmp_path):
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    config = {"r": 3, "lora_alpha": 3}
    made = {"unet": adapted(bases["unet"], attention, **config)}
    if generation != "oldest, bare":
        made["text"] = adapted(bases["text"], ["q_proj", "k_proj", "v_proj", "out_proj"], **config)
    layers = {name: strip(get_peft_model_state_dict(model)) for name, model in made.items()}
    write = {
        "present": dict,
        "without metadata": dict,
        "mixed": convert_state_dict_to_diffusers,
        "lora.down": middle,
        "oldest": oldest,
        "oldest, bare": oldest,
    }[generation]
    prefixes = {"unet": "unet.", "text": "text_encoder.text_model."} if generation != "oldest, bare" else {"unet": ""}
    state = {f"{prefixes[name]}{key}": value for name, part in layers.items() for key, value in write(part).items()}
    if generation.startswith("oldest"):
        file = tmp_path / "pytorch_lora_weights.bin"
        torch.save(state, file)
    else:
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(state, file)
    found = fit(tmp_path, modules, *made)
    assert files.read(tmp_path).format == "diffusers"
    for name, model in made.items():
        assert_merges(modules[name], params[name], found[name], merged_by_peft(model))
    if generation in (
        "without metadata",
        "mixed",
        "oldest",
    ):  # those that today's diffusers still reads for both models
        pipe = pipeline(bases)
        pipe.load_lora_weights(file)
        for name, loaded in (("unet", pipe.unet), ("text", pipe.text_encoder)):
            assert_merges(modules[name], params[name], found[name], merged_by_peft(loaded))


def test_one_models_file_of_diffusers_without_prefix_is_read(bases, modules, params, tmp_path):
    """`unet.save_lora_adapter` writes neither prefix nor the settings' prefix."""
    unet = copy.deepcopy(bases["unet"])
    unet.add_adapter(LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False, **KINDS["patterns"]))
    unet.save_lora_adapter(tmp_path)
    found = fit(tmp_path, modules, "unet", "text")
    assert list(found) == ["unet"]
    assert_merges(modules["unet"], params["unet"], found["unet"], merged_by_peft(unet))


def test_alphas_beside_diffusers_names_count(modules, tmp_path):
    state = {f"unet.conv_in.lora_{n}.weight": torch.ones(s) for n, s in (("A", (2, 4, 3, 3)), ("B", (32, 2, 1, 1)))}
    save_file({**state, "unet.conv_in.alpha": torch.tensor(5.0)}, tmp_path / "a.safetensors")
    assert fit(tmp_path / "a.safetensors", modules)["unet"]["conv_in"]["kernel"]["scale"] == 2.5


# kohya


def kohya(model, name, dtype=torch.float32, alpha=torch.float32):
    """A PeftModel's adapters as kohya's scripts name and lay them out, written down here by hand."""
    prefix = {"unet": "lora_unet_", "text": "lora_te_text_model_"}[name]
    state = {}
    for module, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            key = prefix + module.replace(".", "_")
            state[f"{key}.lora_down.weight"] = layer.lora_A["default"].weight.detach().to(dtype)
            state[f"{key}.lora_up.weight"] = layer.lora_B["default"].weight.detach().to(dtype)
            state[f"{key}.alpha"] = torch.tensor(layer.scaling["default"] * layer.r["default"]).to(alpha)
            if "default" in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector["default"].weight.detach().reshape(-1)
                shape = (-1, *(1,) * (layer.get_base_layer().weight.ndim - 1))
                state[f"{key}.dora_scale"] = magnitude.reshape(shape).to(dtype)
    return state


@pytest.mark.parametrize("kind", ["lora", "patterns", "dora"])
def test_kohyas_file_is_read_and_written_back(kind, bases, modules, params, tmp_path):
    made = {name: adapted(bases[name], on, **KINDS[kind]) for name, on in (("unet", ON_UNET), ("text", ON_TEXT))}
    save_file(
        {k: v for name, model in made.items() for k, v in kohya(model, name).items()}, tmp_path / "theirs.safetensors"
    )
    found = fit(tmp_path / "theirs.safetensors", modules)
    for name, model in made.items():
        assert_merges(modules[name], params[name], found[name], merged_by_peft(model))
    files.write(found, modules, tmp_path / "ours.safetensors", "kohya")
    assert_same_arrays(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    if kind == "dora":
        return  # diffusers drops dora_scale from Stable Diffusion's files
    pipe = pipeline(bases)
    pipe.load_lora_weights(tmp_path / "ours.safetensors")
    for name, loaded in (("unet", pipe.unet), ("text", pipe.text_encoder)):
        assert_loaded(loaded, made[name])
        if (name, kind) != ("text", "patterns"):  # its alphas of a text encoder go by names that transformers 5 dropped
            assert_alike(loaded, made[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_half_precision_comes_back_bit_by_bit(form, dtype, bases, modules, tmp_path):
    made = adapted(bases["unet"], ON_UNET, r=3, lora_alpha=0.7, use_dora=True).to(dtype)
    if form == "peft":
        made.save_pretrained(tmp_path / "a")
    elif form == "diffusers":
        config = made.peft_config["default"].to_dict()
        state = strip(get_peft_model_state_dict(made))
        StableDiffusionPipeline.save_lora_weights(tmp_path / "a", state, unet_lora_adapter_metadata=config)
    else:
        save_file(kohya(made, "unet", dtype, dtype), tmp_path / "a.safetensors")
    source = tmp_path / ("a.safetensors" if form == "kohya" else "a")
    dest = tmp_path / ("b.safetensors" if form == "kohya" else "b")
    files.write(fit(source, modules, dtype=None), modules, dest, form)
    pairs = [next(place.rglob("*.safetensors")) if place.is_dir() else place for place in (source, dest)]
    assert_same_arrays(*pairs)
    wide = fit(dest, modules)["unet"]  # float32 is the default
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(wide)} == {"float32"}


def test_a_dtype_can_be_asked_for_and_no_number_is_lost_to_it(bases, modules, tmp_path):
    adapted(bases["unet"], ["to_q"], r=2, lora_alpha=257).save_pretrained(tmp_path / "a")
    found = fit(tmp_path / "a", modules, "unet")
    files.write(found, modules, tmp_path / "b.safetensors", "kohya", "bfloat16")
    kinds = {(name.rpartition(".")[2], array.dtype) for name, array in load_file(tmp_path / "b.safetensors").items()}
    assert kinds == {("weight", torch.bfloat16), ("alpha", torch.float32)}  # 257 is no bfloat16
    kernel = found["unet"]["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn1"]["to_q"]["kernel"]
    kernel["a"] = np.full_like(kernel["a"], 1e6)
    with pytest.raises(ConversionError, match=r"mid_block/.*too large for float16"):
        files.write(found, modules, tmp_path / "c.safetensors", "kohya", "float16")
    assert not list(tmp_path.glob("*c.safetensors*"))


def test_kohyas_variations_are_read(modules, tmp_path):
    """1x1 convolutions as products and the other way round, a missing alpha, an integer one, `lora_te1_`, vectors for DoRA."""
    state = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(2, 64),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(64, 2, 1, 1),
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.randn(2, 32, 1, 1),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(128, 2),
        "lora_unet_time_embedding_linear_1.alpha": torch.tensor(3),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(48, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale": torch.randn(48),
    }
    save_file(state, tmp_path / "a.safetensors")
    found = fit(tmp_path / "a.safetensors", modules)
    proj = found["unet"]["mid_block"]["attentions_0"]["proj_in"]["kernel"]
    np.testing.assert_array_equal(
        proj["a"], state["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].numpy().T[None, None]
    )
    np.testing.assert_array_equal(
        proj["b"], state["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"].numpy()[:, :, 0, 0].T
    )
    assert proj["scale"] == 1 and found["unet"]["time_embedding"]["linear_1"]["kernel"]["scale"] == 1.5
    assert found["text"]["layers_0"]["mlp"]["fc1"]["kernel"]["magnitude"].shape == (48,)


@pytest.mark.parametrize("shape", [(1, 32), (1, 32, 1, 1), (32, 32)])
def test_magnitudes_of_the_inputs_are_no_dora_of_ours(shape, modules, tmp_path):
    """LyCORIS' wd_on_output=False; of a square kernel, where only the axis tells."""
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    state = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    save_file({**state, f"{key}.dora_scale": torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"dora_scale has the shape .*, not one number for each of 32 outputs"):
        files.fit(files.read(tmp_path / "a.safetensors"), modules)


def test_kohyas_header_says_what_its_readers_look_for(bases, modules, tmp_path):
    made = adapted(bases["unet"], ["to_q", "conv1"], r=3, lora_alpha=7, rank_pattern={"conv1": 2})
    save_file(kohya(made, "unet"), tmp_path / "a.safetensors", {"ss_tag": "x", "sshs_model_hash": "of another"})
    file = files.read(tmp_path / "a.safetensors")
    sized = {"unet": modules["unet"].clone(cross_attention_dim=768)}
    wide = files.fit(file, modules)
    del wide["unet"]["down_blocks_0"], wide["unet"]["up_blocks_1"], wide["unet"]["mid_block"]["attentions_0"]
    files.write(wide, sized, tmp_path / "b.safetensors", "kohya", metadata=file.metadata)
    header = files.read(tmp_path / "b.safetensors").metadata
    expected = {"ss_tag": "x", "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "7"}
    expected |= {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    assert {key: header[key] for key in expected} == expected
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "7"}
    # as sd-scripts has it: of the bytes that torch's own writer puts behind the header
    data = safetensors.torch.save(load_file(tmp_path / "b.safetensors"), {"ss_tag": "x"})
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(behind).hexdigest()
    files.write(files.fit(file, modules), modules, tmp_path / "c.safetensors", "kohya")
    header = files.read(tmp_path / "c.safetensors").metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "7")


@pytest.fixture(scope="module")
def full():
    """Stable Diffusion 1.5: ours, and diffusers' and transformers' without numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
    return {name: models.create(f"sd15/{name}") for name in ("unet", "text")}, {"unet": unet, "text": text}


def layers(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def ours_in_full(module, naming):
    return [leaf for leaf in lora_places.leaves(module, naming) if not leaf.table]


def test_kohya_names_of_every_module_of_stable_diffusion(full, tmp_path):
    """Against the modules of diffusers' UNet and transformers' CLIP; their shapes, too."""
    ours, theirs = full
    state, expected = {}, {}
    for name, prefix in (("unet", "lora_unet_"), ("text", "lora_te_text_model_")):
        for module, layer in layers(theirs[name]).items():
            key, spatial = prefix + module.replace(".", "_"), layer.weight.shape[2:]
            state[f"{key}.lora_down.weight"] = torch.randn(1, layer.weight.shape[1], *spatial)
            state[f"{key}.lora_up.weight"] = torch.randn(layer.weight.shape[0], 1, *(1 for _ in spatial))
            state[f"{key}.alpha"] = torch.tensor(1.0)
            expected[key] = layer
    count = {name: sum(key.startswith(prefix) for key in expected) for name, prefix in lora_names.KOHYA.items()}
    attention = [key for key in expected if "attentions" in key and "unet" in key]
    assert count["text"] == 72 and len(attention) == 192 and count["unet"] == len(layers(theirs["unet"])) == 282
    save_file(state, tmp_path / "a.safetensors")
    found = fit(tmp_path / "a.safetensors", ours)
    assert {name: len(lora.by_path(part)) for name, part in found.items()} == count
    files.write(found, ours, tmp_path / "b.safetensors", "kohya")
    assert_same_arrays(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    unet = {name: value for name, value in state.items() if name.startswith("lora_unet")}
    theirs_names, alphas = peer._convert_non_diffusers_lora_to_diffusers(dict(unet))
    assert len(theirs_names) == 2 * count["unet"] and len(alphas) == count["unet"]


def test_compvis_names_of_every_module_of_stable_diffusion(full, tmp_path):
    """Against diffusers' own map from CompVis' blocks to its, for the modules that are in blocks."""
    module = full[0]["unet"]
    state = {}
    for leaf in ours_in_full(module, Naming("compvis")):
        (((name,),),) = leaf.modules
        key, (*spatial, fan_in, out) = f"lora_unet_{name.replace('.', '_')}", leaf.kernel
        state[f"{key}.lora_down.weight"] = torch.randn(1, fan_in, *spatial)
        state[f"{key}.lora_up.weight"] = torch.randn(out, 1, *(1 for _ in spatial))
    assert len(state) == 2 * len(layers(full[1]["unet"]))
    save_file(state, tmp_path / "a.safetensors")
    found = fit(tmp_path / "a.safetensors", full[0])["unet"]

    class Config:
        layers_per_block = 2

    blocks = {key: value for key, value in state.items() if "block" in key and "input_blocks_0_0" not in key}
    # one block at a time, since it takes block 10 for 1; the level without attention it takes for SDXL's, which has some
    one = lambda key: re.search(r"(in|middle|out)put_blocks_\d+_|middle_block_\d", key)[0]  # noqa: E731
    blocks = {key: value for key, value in blocks.items() if "output_blocks_2_1" not in key}
    mapped = {}
    for block in {one(key) for key in blocks}:
        part = {key: value for key, value in blocks.items() if one(key) == block}
        mapped |= peer._maybe_map_sgm_blocks_to_diffusers(part, Config)
    # what is left of CompVis inside a block: the residual blocks' layers
    inside = {
        "in_layers_2": "conv1",
        "out_layers_3": "conv2",
        "emb_layers_1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    inside |= {"input_blocks": "down_blocks", "output_blocks": "up_blocks", "middle_block": "mid_block"}
    theirs = {}
    for key, value in mapped.items():
        for compvis, diffusers in inside.items():
            key = key.replace(compvis, diffusers)
        theirs[key.replace("downsamplers_0_op", "downsamplers_0_conv")] = value
    files.write({"unet": found}, full[0], tmp_path / "b.safetensors", "kohya")
    ours = load_file(tmp_path / "b.safetensors")
    assert len(theirs) > 500 and set(theirs) <= set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_what_diffusers_writes_for_kohya_is_read(bases, modules, params, tmp_path):
    """Its alphas are the ranks, as integers."""
    model = adapted(bases["unet"], ON_UNET, r=3, lora_alpha=3)
    state = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in strip(get_peft_model_state_dict(model)).items()})
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    found = fit(tmp_path / "a.safetensors", modules)
    assert_merges(modules["unet"], params["unet"], found["unet"], merged_by_peft(model))


# DiT: fused q, k, v and stacked layers


def test_dits_kernels_hold_several_adapters_and_give_them_back(bases, modules, params, tmp_path):
    """Ranks that differ by part and by layer, parts and layers without an adapter, and embedders stored once a block."""
    targets = r"transformer_blocks\.(0\.attn1\.to_[qv]|[02]\.attn1\.to_k|2\.ff\.net\.2|\d\.attn1\.to_out\.0|\d\.norm1\.linear)"
    targets += r"|transformer_blocks\.\d\.norm1\.emb\.timestep_embedder\.linear_1|proj_out_2|pos_embed\.proj"
    model = adapted(
        bases["dit"], targets, r=3, lora_alpha=7, rank_pattern={"0.attn1.to_q": 2}, alpha_pattern={"to_k": 1.25}
    )
    first, *copies = (block.norm1.emb.timestep_embedder.linear_1 for block in model.base_model.model.transformer_blocks)
    for other in copies:
        other.load_state_dict(first.state_dict())
    model.save_pretrained(tmp_path / "a")
    found = fit(tmp_path / "a", modules, "dit")
    assert_merges(modules["dit"], params["dit"], found["dit"], merged_by_peft(model))
    qkv = found["dit"]["blocks"]["attn"]["qkv"]["kernel"]
    assert qkv["a"].shape == (3, 32, 8) and qkv["b"].shape == (3, 8, 96) and qkv["scale"].shape == (3, 8)
    np.testing.assert_allclose(qkv["scale"][0], [3.5] * 2 + [1.25 / 3] * 3 + [7 / 3] * 3, rtol=1e-6)
    assert (qkv["scale"][1] == 0).all() and found["dit"]["blocks"]["attn"]["proj"]["kernel"]["scale"].shape == (3,)

    files.write(fit(tmp_path / "a", modules, "dit", dtype=None), modules, tmp_path / "b", "peft")
    assert_same_arrays(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b" / "adapter_model.safetensors")
    opened = PeftModel.from_pretrained(copy.deepcopy(bases["dit"]), tmp_path / "b")
    assert_alike(opened, model)
    # the official names have q, k and v as one: the adapter stays together, its unlike scales in b
    files.write(found, modules, tmp_path / "c", "peft", namings={"dit": Naming("dit")})
    names = {
        name.removeprefix("base_model.model.").partition(".lora")[0]
        for name in load_file(tmp_path / "c" / "adapter_model.safetensors")
    }
    assert {"blocks.0.attn.qkv", "blocks.2.mlp.fc2", "t_embedder.mlp.0", "final_layer.linear"} <= names
    assert "blocks.1.attn.qkv" not in names
    together = fit(tmp_path / "c", modules, "dit")["dit"]
    assert_merges(modules["dit"], params["dit"], together, merged_by_peft(model))


def test_a_trained_fused_adapter_becomes_three_that_share_a(bases, modules, params, tmp_path):
    rng = np.random.default_rng(0)
    one = {"a": rng.normal(size=(3, 32, 2)), "b": rng.normal(size=(3, 2, 96)), "scale": np.full(3, 0.5)}
    one = {name: value.astype(np.float32) for name, value in one.items()}
    adapters = {"blocks": {"attn": {"qkv": {"kernel": one}}}}
    for form, prefix in (("peft", "base_model.model."), ("diffusers", "transformer.")):
        files.write({"dit": adapters}, modules, tmp_path / form, form)
        state = load_file(next((tmp_path / form).glob("*.safetensors")))
        assert len(state) == 3 * 3 * 2
        of = lambda part: state[f"{prefix}transformer_blocks.1.attn1.to_{part}.lora_A.weight"]  # noqa: B023, E731
        assert torch.equal(of("q"), of("k")) and torch.equal(of("q"), of("v"))
        assert_merges(
            modules["dit"],
            params["dit"],
            fit(tmp_path / form, modules, "dit")["dit"],
            as_arrays(modules["dit"], params["dit"], adapters),
        )
    opened = PeftModel.from_pretrained(copy.deepcopy(bases["dit"]), tmp_path / "peft")
    assert_merges(modules["dit"], params["dit"], adapters, merged_by_peft(opened))


def as_arrays(module, params, adapters):
    return merged(module, params, adapters)


def test_dora_of_fused_and_stacked_kernels_is_all_or_nothing(bases, modules, params, tmp_path):
    model = adapted(bases["dit"], r".*\.(to_[qkv]|ff\.net\.2)", **KINDS["dora"])
    model.save_pretrained(tmp_path / "a")
    found = fit(tmp_path / "a", modules, "dit")
    assert_merges(modules["dit"], params["dit"], found["dit"], merged_by_peft(model))
    files.write(found, modules, tmp_path / "b", "peft")
    assert_same_arrays(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b" / "adapter_model.safetensors")
    for i, targets in enumerate((r".*\.to_[qv]", r".*\.[01]\.ff\.net\.2")):
        adapted(bases["dit"], targets, **KINDS["dora"]).save_pretrained(tmp_path / f"part{i}")
        with pytest.raises(ConversionError, match="is DoRA, and not all the modules are"):
            files.fit(files.read(tmp_path / f"part{i}"), modules)


def test_unlike_copies_of_an_embedder_are_refused(bases, modules, tmp_path):
    for i, targets in enumerate(
        (r".*\.timestep_embedder\.linear_1", r".*\.[02]\.norm1\.emb\.timestep_embedder\.linear_1")
    ):
        adapted(bases["dit"], targets, r=2).save_pretrained(tmp_path / str(i))
        with pytest.raises(
            ConversionError, match="of which it must be a copy" if i == 0 else "its copy, has no adapter"
        ):
            files.fit(files.read(tmp_path / str(i)), modules)


@pytest.mark.parametrize("seed", range(20))
def test_taking_apart_undoes_putting_together(seed, modules):
    """For any ranks, scales and gaps."""
    rng = np.random.default_rng(seed)
    leaf = next(
        leaf for leaf in lora_places.leaves(modules["dit"], Naming("diffusers")) if leaf.path.endswith("qkv/kernel")
    )
    stored = {}
    for place in np.ndindex(3, 3):
        if rank := int(rng.integers(0, 4)):
            a, b = rng.normal(size=(rank, 32)).astype(np.float32), rng.normal(size=(32, rank)).astype(np.float32)
            stored[place] = files.Stored(a, b, float(np.float32(rng.normal())), None, False, {"a": "a", "b": "b"})
    cells = lora_cells.apart(leaf, lora_cells.together(leaf, stored, None))
    assert set(cells) == set(stored)
    for place, cell in cells.items():
        np.testing.assert_array_equal(cell.a, stored[place].a.T)
        np.testing.assert_array_equal(cell.b, stored[place].b.T)
        assert np.float32(cell.scale) == np.float32(stored[place].scale)


@pytest.mark.parametrize("alpha", [1, 7, 16, 0.1, 1.5, 1 / 3, 1e-4, 257, 12345.678, math.pi, -2])
def test_an_alpha_is_found_again_from_the_scale(alpha):
    for rank in (*range(1, 70), 128, 320):
        found = lora_config.alpha(np.float32(alpha / rank), rank)
        assert np.float32(found / rank) == np.float32(alpha / rank)
        assert found == pytest.approx(alpha, rel=1e-6)
        if float(f"{alpha:.3g}") == alpha:
            assert found == alpha and isinstance(found, int) == (alpha == int(alpha))


# Several models, other places


def test_pefts_folders_of_a_pipeline(bases, modules, tmp_path):
    by_diffusers(bases, tmp_path / "a", "lora")
    found = fit(tmp_path / "a", modules)
    files.write(found, modules, tmp_path / "b", "peft", metadata={"base_model_name_or_path": "me/base"})
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["text_encoder", "unet"]
    assert (
        json.loads((tmp_path / "b" / "unet" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "me/base"
    )
    again = files.read(tmp_path / "b")
    assert again.metadata["base_model_name_or_path"] == "me/base"
    for name, part in files.fit(again, modules).items():
        assert_equal(dict(sorted(tree.flatten(part).items())), dict(sorted(tree.flatten(found[name]).items())))
    PeftModel.from_pretrained(copy.deepcopy(bases["text"]), tmp_path / "b" / "text_encoder")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_text_encoders_mlp_alone(form, bases, modules, params, tmp_path):
    """diffusers takes a text encoder's adapters for its own only by attention's, or by an older spelling."""
    model = adapted(bases["text"], ["fc1"], r=2)
    model.save_pretrained(tmp_path / "a")
    files.write(fit(tmp_path / "a", modules, "text"), modules, tmp_path / "b.safetensors", form)
    pipe = pipeline(bases)
    pipe.load_lora_weights(tmp_path / "b.safetensors")
    assert_alike(pipe.text_encoder, model)
    assert_equal(fit(tmp_path / "b.safetensors", modules), fit(tmp_path / "a", modules, "text"))


def test_an_existing_place_stays_as_it_is(bases, modules, tmp_path):
    adapted(bases["text"], ["fc1"], r=2).save_pretrained(tmp_path / "a")
    with pytest.raises(ConversionError, match="exists"):
        files.write(fit(tmp_path / "a", modules, "text"), modules, tmp_path / "a", "peft")


# What is refused


def state_of(bases, kind="lora"):
    made = {
        name: adapted(bases[name], on, **KINDS[kind])
        for name, on in (("unet", ["to_q", "conv1"]), ("text", ["q_proj"]))
    }
    return {key: value for name, model in made.items() for key, value in kohya(model, name).items()}


A = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
B = A.replace("lora_down", "lora_up")
MUTATIONS = {
    "half": (lambda s: s.pop(B), f"{A} is there without {B}"),
    "alpha alone": (lambda s: (s.pop(A), s.pop(B)), f"{A.split('.')[0]}.alpha is there without a and b"),
    "renamed module": (
        lambda s: move(s, "attn1_to_q", "attn1_to_queue"),
        r"no module 'down_.*queue' \(did you mean 'down_.*attn1_to_q'\?\)",
    ),
    "renamed part": (
        lambda s: s.update({A.replace("down.w", "dwon.w"): s.pop(A)}),
        rf"unexpected: .*lora_dwon.weight \(did you mean '{A}'",
    ),
    "truncated ranks": (lambda s: s.update({A: s[A][:2]}), f"{A} has rank 2 and {B} 3"),
    "transposed": (lambda s: s.update({A: s[A].T}), f"{A} has rank 32 and {B} 3"),
    "both transposed": (
        lambda s: s.update({A: s[A].T, B: s[B].T}),
        f"{A} has rank 32 and {B} 32|not .*it is for another model",
    ),
    "rank 0": (lambda s: s.update({A: s[A][:0], B: s[B][:, :0]}), rf"{A} has the shape \[0, 32\]"),
    "another model's": (
        lambda s: s.update({A: torch.randn(3, 320)}),
        rf"{A} has the shape \[3, 320\], not \[r, 32\] .*another model",
    ),
    "NaN": (lambda s: s[A].__setitem__((0, 0), math.nan), f"{A} holds NaN or infinity"),
    "infinity": (lambda s: s[B].__setitem__((0, 0), -math.inf), f"{B} holds NaN or infinity"),
    "integers": (lambda s: s.update({A: s[A].to(torch.int8)}), f"{A} is of int8"),
    "alpha 0": (
        lambda s: s.update({A.split(".")[0] + ".alpha": torch.tensor(0.0)}),
        r"alpha is \[0.0\], not one finite",
    ),
    "twice": (lambda s: copy_keys(s, "lora_te_", "lora_te1_"), "says again what"),
    "something else": (
        lambda s: s.update({"lora_prior_x.lora_down.weight": torch.ones(1, 1)}),
        "unexpected: lora_prior_x",
    ),
}


def copy_keys(state, old, new):
    for key in [key for key in state if key.startswith(old)]:
        state[key.replace(old, new)] = state[key].clone()


def move(state, old, new):
    for key in [key for key in state if f"{old}." in key]:
        state[key.replace(old, new)] = state.pop(key)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_file_with_something_wrong_is_refused_by_name(what, bases, modules, tmp_path):
    change, message = MUTATIONS[what]
    state = {key: value.clone() for key, value in state_of(bases).items()}
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=message) as error:
        files.fit(files.read(tmp_path / "a.safetensors"), modules)
    assert "\n" not in str(error.value) and str(tmp_path / "a.safetensors") in str(error.value)


def test_a_file_for_another_model_says_how_little_fits(bases, modules, tmp_path):
    state = {
        key.replace("down_blocks_0", "down_blocks_7").replace("mid_block", "mid"): v
        for key, v in state_of(bases).items()
    }
    save_file({k: v for k, v in state.items() if "unet" in k and "up_blocks" not in k}, tmp_path / "a.safetensors")
    file = files.read(tmp_path / "a.safetensors")
    assert files.land(file, modules).matched < files.land(file, modules).total == file.total
    with pytest.raises(ConversionError, match=r"\d+ of \d+ arrays fit: .*; and \d+ more"):
        files.fit(file, modules)
    with pytest.raises(ConversionError, match=r"adapters are of a unet, and the models given are \['text'\]"):
        files.fit(file, {"text": modules["text"]})


OTHERS = {
    "LoHa": {"lora_unet_conv_in.hada_w1_a": (4, 4)},
    "LoKr": {"lora_unet_conv_in.lokr_w1": (4, 4)},
    "Tucker": {"lora_unet_conv_in.lora_mid.weight": (4, 4)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": (4, 4)},
    "a ControlNet or its LoRA": {"lora_controlnet": (1,), "input_blocks.0.0.weight": (4, 4)},
    "a textual inversion": {"emb_params": (2, 768)},
    "textual inversion": {"<cat-toy>": (768,)},
    "a whole checkpoint": {"model.diffusion_model.out.2.weight": (4, 4)},
    "second text encoder": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 4)},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 4)},
    "biases": {"unet.conv_in.lora_B.bias": (4,)},
    "holds no LoRA": {"down_blocks.0.resnets.0.conv1.weight": (4, 4)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_lora_is_called_by_its_name(what, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in OTHERS[what].items()}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=what) as error:
        files.read(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_an_inversion_of_web_uis_and_pefts_other_kinds(bases, tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="textual inversion"):
        files.read(tmp_path / "a.pt")
    for config in (LoHaConfig, LoKrConfig):
        folder = tmp_path / config.__name__
        get_peft_model(copy.deepcopy(bases["text"]), config(target_modules=["q_proj"], r=2)).save_pretrained(folder)
        with pytest.raises(ConversionError, match="LoHa" if config is LoHaConfig else "LoKr"):
            files.read(folder)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    for name in GLOBALS[:6]:
        (tmp_path / "pytorch_lora_weights.bin").write_bytes(archive(call(name)))
        with pytest.raises(ConversionError, match="not on the list of harmless names"):
            files.read(tmp_path)


def test_a_hostile_header_is_refused(bases, tmp_path):
    data = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(32, 2, 1, 1)}
    for text, message in (("[" * 100_000, "cannot be read"), ("3", "cannot be read"), ('{"unet.r": "2"}', "r=2")):
        save_file(data, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ConversionError, match=message):
            files.read(tmp_path / "a.safetensors")
    # settings that would be passed over: scales of 1 in place of theirs
    save_file(data, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 9}'})
    with pytest.raises(ConversionError, match="settings of a single model, and no adapter of it"):
        files.read(tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("x/y", io.BytesIO(b"1").read())
    with pytest.raises(ConversionError, match=r"no data\.pkl"):
        files.read(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a["unet"]["conv_in"].update(kernle=a["unet"]["conv_in"].pop("kernel")),
            "no kernel 'conv_in/kernle' .*did you mean 'conv_in/kernel'",
        ),
        (lambda a: a["unet"]["conv_in"]["kernel"].pop("b"), r"lacks \['b'\]"),
        (
            lambda a: a["unet"]["conv_in"]["kernel"].update(b=np.ones((3, 5))),
            r"conv_in/kernel has b of the shape \[3, 5\], not \[3, 32\]",
        ),
        (lambda a: a["unet"]["conv_in"]["kernel"].update(b=np.full((3, 32), np.nan)), "NaN or infinity in b"),
        (lambda a: a["unet"].clear(), "would hold no adapter"),
        (lambda a: a.update(dit=a["unet"]), "no place for a dit"),
        (lambda a: a.update(net=a["unet"]), "adapters of a net"),
    ],
)
def test_adapters_that_are_not_the_models_are_not_written(change, message, bases, modules, tmp_path):
    adapted(bases["unet"], ["conv_in"], **KINDS["lora"]).save_pretrained(tmp_path / "a")
    found = fit(tmp_path / "a", modules, "unet")
    change(found)
    with pytest.raises(ConversionError, match=message):
        files.write(found, modules, tmp_path / "b.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_formats_have_their_places(bases, modules, params, tmp_path):
    adapted(bases["text"], ["token_embedding"], **KINDS["lora"]).save_pretrained(tmp_path / "a")
    found = fit(tmp_path / "a", modules, "text")
    with pytest.raises(ConversionError, match="no adapters of tables"):
        files.write(found, modules, tmp_path / "b.safetensors", "kohya")
    with pytest.raises(ConversionError, match=r"kohya is a file NAME\.safetensors"):
        files.write(found, modules, tmp_path / "b", "kohya")
    with pytest.raises(ConversionError, match="peft is a folder"):
        files.write(found, modules, tmp_path / "b.safetensors", "peft")
    with pytest.raises(ConversionError, match="did you mean 'kohya'"):
        files.write(found, modules, tmp_path / "b", "kohia")


# Through the model


def test_outputs_are_diffusers_from_every_format(bases, modules, params, tmp_path):
    """One compiled function, whose adapters come from three files."""
    made = adapted(bases["unet"], ON_UNET, **KINDS["dora"])
    made.save_pretrained(tmp_path / "peft")
    found = fit(tmp_path / "peft", modules, "unet")
    files.write(found, modules, tmp_path / "diffusers", "diffusers")
    save_file(kohya(made, "unet"), tmp_path / "kohya.safetensors")
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(2, 5, 32)).astype(np.float32)
    t = np.array([3.0, 801.0], np.float32)
    with torch.no_grad():
        expected = made(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(context)).sample
        plain = bases["unet"](torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(context)).sample
    assert (expected - plain).abs().max() > 0.1
    run = jax.jit(
        lambda adapters: modules["unet"].apply(
            {"params": lora.attach(params["unet"], adapters)}, x, jnp.asarray(t), context
        )
    )
    for name in ("peft", "diffusers", "kohya.safetensors"):
        ours = run(jax.tree.map(jnp.asarray, fit(tmp_path / name, modules)["unet"]))
        np.testing.assert_allclose(np.asarray(ours), expected.permute(0, 2, 3, 1).numpy(), atol=1e-4, err_msg=name)
