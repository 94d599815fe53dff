"""CLIP's two towers, its folder and its preparation of pictures equal transformers', on the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

import jdiff
from jdiff import convert, models, tree

TINY_CLIP = {
    "text_config": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": 99,
        "bos_token_id": 97,
        "eos_token_id": 98,
        "pad_token_id": 98,
    },
    "vision_config": {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 24,
}
DTYPES = {"fp32": (jnp.float32, torch.float32, 1e-4), "fp64": (jnp.float64, torch.float64, 1e-8)}


def make_peer(config=TINY_CLIP, **text):
    torch.manual_seed(0)
    config = json.loads(json.dumps(config))
    config["text_config"] |= text
    peer = CLIPModel(CLIPConfig(**config)).eval().requires_grad_(False)
    peer.logit_scale.fill_(1.7)
    return peer


def compare(peer, kind):
    """Pictures' and texts' places in the space, and the logits of each pair."""
    dtype, peer_dtype, tolerance = DTYPES[kind]
    config = peer.config
    with jax.enable_x64(kind == "fp64"):
        peer = peer.to(peer_dtype)
        module = models.from_config(config.to_dict(), dtype)
        state = {name: value.numpy() for name, value in peer.state_dict().items() if "position_ids" not in name}
        params = jax.tree.map(jnp.asarray, convert.from_torch(module, state))
        rng = np.random.default_rng(0)
        size, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
        x = rng.normal(size=(3, size, size, 3))
        ids = rng.integers(0, vocabulary - 2, (2, 77))
        ids[0, 5:], ids[1, 76] = vocabulary - 1, vocabulary - 1
        pictures, texts = torch.tensor(x, dtype=peer_dtype).permute(0, 3, 1, 2), torch.tensor(ids)
        expected = peer(input_ids=texts, pixel_values=pictures)
        run = lambda method, *inputs: jax.jit(  # noqa: E731
            lambda p, *inputs: module.apply({"params": p}, *inputs, method=method)
        )(params, *inputs)
        x, ids = jnp.asarray(x, dtype), jnp.asarray(ids)
        found = {"image_embeds": run("image", x), "text_embeds": run("text", ids)}
        for name, value in found.items():
            unit = value / np.linalg.norm(value, axis=1, keepdims=True)
            np.testing.assert_allclose(unit, expected[name].numpy(), rtol=0, atol=tolerance)
        lengths = peer.vision_model(pictures).pooler_output @ peer.visual_projection.weight.T
        np.testing.assert_allclose(found["image_embeds"], lengths.numpy(), rtol=0, atol=tolerance * 10)
        logits = run(None, x, ids)
        np.testing.assert_allclose(logits, expected.logits_per_image.numpy(), rtol=0, atol=tolerance * 10)
    return module


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_both_towers_equal_transformers(activation, kind):
    config = json.loads(json.dumps(TINY_CLIP))
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = activation
    compare(make_peer(config), kind)


def test_old_configs_read_a_text_at_its_largest_id():
    assert compare(make_peer(eos_token_id=2), "fp32").eos_id == 98


def test_a_folder_comes_back_byte_for_byte(tmp_path):
    peer = make_peer()
    peer.save_pretrained(tmp_path / "clip")
    found = convert.read(tmp_path / "clip")
    assert list(found.parts) == ["clip"] and found.mapped == found.total == len(peer.state_dict())
    convert.write(found, tmp_path / "back")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("clip", "back"))
    assert sorted(left) == sorted(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("clip", "back")]
    assert configs[0] == configs[1]
    module, params = jdiff.load(tmp_path / "clip")
    # jdiff's own file says what it holds, and makes a folder that transformers opens
    convert.write(found, tmp_path / "clip.safetensors", "safetensors")
    again = convert.read(tmp_path / "clip.safetensors")
    assert again.parts["clip"].module == module
    convert.write(again, tmp_path / "again", "diffusers")
    theirs = CLIPModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in peer.state_dict().items())
    with pytest.raises(ValueError, match="CompVis' format has no place for a CLIP"):
        convert.write(found, tmp_path / "clip.ckpt", "compvis")
    assert tree.count(params) == sum(value.numel() for value in peer.parameters())


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("vision_config", {"num_channels": 4}, "num_channels=4 is not supported"),
        ("vision_config", {"patch_size": 7}, "image_size=32 is not a multiple of patch_size=7"),
        ("text_config", {"hidden_act": "silu"}, "activation='silu' is unknown"),
        ("text_config", {"rope_theta": 10.0}, "rope_theta"),
    ],
)
def test_a_config_of_something_else_is_refused(part, change, named):
    config = make_peer().config.to_dict()
    with pytest.raises(ValueError, match=named):
        models.from_config({**config, part: {**config[part], **change}})


@pytest.mark.parametrize(("name", "count"), [("CLIP-ViT-B/32", 151_277_313), ("CLIP-ViT-L/14", 427_616_513)])
def test_parameter_counts(name, count):
    module = models.create(name)
    assert tree.count(jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0))) == count


@pytest.mark.slow
def test_full_size_equals_transformers():
    assert compare(make_peer({"text_config": {}, "vision_config": {}}), "fp32") == models.create("CLIP-ViT-B/32")


@pytest.mark.slow
def test_full_size_large_equals_transformers():
    config = {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        "projection_dim": 768,
    }
    config["vision_config"] |= {"num_attention_heads": 16, "patch_size": 14}
    assert compare(make_peer(config), "fp32") == models.create("CLIP-ViT-L/14")
