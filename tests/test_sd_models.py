"""The UNet, the autoencoder and CLIP's text encoder equal diffusers and transformers on the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from transformers import CLIPTextConfig, CLIPTextModel

from jdiff import convert, models, tree
from jdiff.models import vae
from jdiff.models.unet import UNet

COUNTS = {"sd15/unet": 859_520_964, "sd15/vae": 83_653_863, "sd15/text": 123_060_480}
DTYPES = {"fp32": (jnp.float32, torch.float32, 1e-4), "fp64": (jnp.float64, torch.float64, 1e-8)}
ATTENDS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UNETS = {
    "sd1": {"attention_head_dim": 4, "cross_attention_dim": 48},
    "sd2": {"attention_head_dim": (2, 4, 8), "cross_attention_dim": 40, "use_linear_projection": True},
    "inpainting": {"attention_head_dim": 2, "cross_attention_dim": 48, "in_channels": 9, "layers_per_block": 1},
}


def ours(peer, dtype):
    """The peer's module and parameters in jdiff."""
    module = models.from_config(json.loads(peer.to_json_string()), dtype)
    params = convert.from_torch(module, {name: value.numpy() for name, value in peer.state_dict().items()})
    return module, jax.tree.map(jnp.asarray, params)


def nchw(x, dtype):
    return torch.tensor(x, dtype=dtype).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).numpy()


def exact_waves(unet, dtype):
    """diffusers forms the timestep's sinusoids in float32 whatever the model's dtype; in float64 they would hide all else."""
    if dtype == torch.float32:
        return unet

    def forward(timesteps):
        half = unet.time_proj.num_channels // 2
        args = timesteps.to(dtype)[:, None] * 10_000.0 ** (-torch.arange(half, dtype=dtype) / half)
        return torch.cat([args.cos(), args.sin()], dim=-1)

    probe = torch.tensor([7])
    theirs = get_timestep_embedding(probe, 2 * (unet.time_proj.num_channels // 2), True, 0)
    assert torch.allclose(forward(probe).float(), theirs, atol=1e-6)
    unet.time_proj.forward = forward
    return unet


@pytest.fixture(params=DTYPES, ids=str)
def dtypes(request):
    ours, theirs, tolerance = DTYPES[request.param]
    torch.manual_seed(0)
    with jax.enable_x64(request.param == "fp64"):
        yield ours, theirs, tolerance


def compare_unet(peer, shape, text, dtypes):
    dtype, peer_dtype, tolerance = dtypes
    peer = exact_waves(peer.eval().to(peer_dtype), peer_dtype).requires_grad_(False)
    module, params = ours(peer, dtype)
    rng = np.random.default_rng(0)
    x, t, context = rng.normal(size=shape), np.array([3, 987])[: shape[0]], rng.normal(size=(shape[0], *text))
    expected = nhwc(peer(nchw(x, peer_dtype), torch.tensor(t), torch.tensor(context, dtype=peer_dtype)).sample)
    found = jax.jit(module.apply)(
        {"params": params}, jnp.asarray(x, dtype), jnp.asarray(t), jnp.asarray(context, dtype)
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    return module, params


SIZES = {"sd1": (24, 40), "sd2": (9, 14), "inpainting": (9, 14)}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param(kind, size, marks=[pytest.mark.slow] * (size != SIZES[kind]))
        for kind in UNETS
        for size in ((24, 40), (9, 14))
    ],
    ids=str,
)
def test_unet_equals_diffusers(kind, size, dtypes):
    settings = {"block_out_channels": (32, 64, 96), "norm_num_groups": 16, "down_block_types": ATTENDS, **UNETS[kind]}
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    peer = UNet2DConditionModel(**settings, up_block_types=up)
    compare_unet(peer, (2, *size, settings.get("in_channels", 4)), (11, settings["cross_attention_dim"]), dtypes)


def compare_vae(peer, shape, dtypes):
    dtype, peer_dtype, tolerance = dtypes
    peer = peer.eval().to(peer_dtype).requires_grad_(False)
    module, params = ours(peer, dtype)
    x = np.random.default_rng(0).uniform(-1, 1, shape)
    expected = peer.encode(nchw(x, peer_dtype)).latent_dist
    found = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode"))(params, jnp.asarray(x, dtype))
    np.testing.assert_allclose(found.mean, nhwc(expected.mean), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.logvar, nhwc(expected.logvar), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.kl(), expected.kl().numpy(), rtol=1e-5)
    picture = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, found.mode())
    np.testing.assert_allclose(picture, nhwc(peer.decode(expected.mean).sample), rtol=0, atol=tolerance)


def test_vae_equals_diffusers(dtypes):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    peer = AutoencoderKL(
        block_out_channels=(24, 40, 64), layers_per_block=2, norm_num_groups=8, latent_channels=3, **levels
    )
    compare_vae(peer, (2, 24, 40, 3), dtypes)


def compare_text(config, length, dtypes):
    dtype, peer_dtype, tolerance = dtypes
    peer = CLIPTextModel(config).eval().to(peer_dtype).requires_grad_(False)
    module = models.from_config(config.to_dict(), dtype)
    params = convert.from_torch(module, {name: value.numpy() for name, value in peer.state_dict().items()})
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    expected = peer(torch.tensor(ids), output_hidden_states=True)
    norm = getattr(peer, "text_model", peer).final_layer_norm
    for skip in (0, 1, 2):
        hidden = expected.last_hidden_state if skip == 0 else norm(expected.hidden_states[-1 - skip])
        found = jax.jit(module.apply, static_argnames="clip_skip")({"params": params}, jnp.asarray(ids), clip_skip=skip)
        np.testing.assert_allclose(found, hidden.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder_equals_transformers(activation, dtypes):
    tokens = {"bos_token_id": 97, "eos_token_id": 98, "vocab_size": 99}
    config = CLIPTextConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=3,
        hidden_act=activation,
        **tokens,
    )
    compare_text(config, 21, dtypes)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    module = models.create(name)
    assert (
        tree.count(jax.eval_shape(lambda key: module.init(key, *module.dummy_inputs()), jax.random.key(0)))
        == COUNTS[name]
    )


def test_multiply_accumulates_of_the_unet():
    assert round(models.create("sd15/unet").macs() * 2e-9) == 803  # GFLOP a 64x64 latent


@pytest.mark.parametrize("name", ["sd15/unet", "sd21/unet", "sd15/vae", "sd15/text", "DiT-S/2"])
def test_a_record_builds_the_same_model(name):
    module = models.create(name)
    assert models.build(json.loads(json.dumps(models.describe(module)))) == module


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
        ({"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        ({"_class_name": "UNet3D"}, "UNet3D"),
    ],
)
def test_a_config_of_something_else_is_refused(change, named):
    config = json.loads(UNet2DConditionModel(block_out_channels=(32,) * 4, cross_attention_dim=32).to_json_string())
    with pytest.raises(ValueError, match=named):
        models.from_config({**config, **change})


def test_wrong_weights_are_listed():
    module = models.create("sd15/vae", block_out_channels=(8, 8), norm_num_groups=4)
    params = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
    arrays = convert.to_torch(module, params)
    good = convert.from_torch(module, arrays)
    assert not tree.differences(params, good)
    jax.tree.map(np.testing.assert_array_equal, good, params)
    lost = arrays.pop("decoder.conv_in.weight")
    with pytest.raises(ValueError, match=r"missing: decoder\.conv_in\.weight"):
        convert.from_torch(module, arrays)
    with pytest.raises(ValueError, match=r"unexpected: encoder\.extra"):
        convert.from_torch(module, {**arrays, "decoder.conv_in.weight": lost, "encoder.extra": lost})
    with pytest.raises(ValueError, match=r"misshapen: decoder\.conv_in\.weight"):
        convert.from_torch(module, {**arrays, "decoder.conv_in.weight": lost[:1]})


def test_recomputation_changes_nothing_and_keeps_attention():
    """Value and gradient are the same; "attention" makes no probability again that "none" does not."""
    sizes = {"block_out_channels": (16,), "attention": (True,), "heads": (2,), "layers_per_block": 1}
    rng = np.random.default_rng(0)
    x, t, context = rng.normal(size=(2, 4, 4, 4)), np.array([3.0, 500.0]), rng.normal(size=(2, 5, 24))
    found, exponentials = {}, {}
    with jax.enable_x64(True):
        unet = UNet(**sizes, cross_attention_dim=24, norm_num_groups=4, dtype=jnp.float64)
        params = jax.jit(unet.init)(jax.random.key(0), x, t, context)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) + 0.01, params)
        for remat in ("none", "attention", "full"):
            apply = unet.clone(remat=remat).apply
            gradient = jax.value_and_grad(lambda p, apply=apply: (apply({"params": p}, x, t, context) ** 2).sum())
            traced = jax.jit(gradient).trace(params)
            found[remat] = traced.lower().compile()(params)
            exponentials[remat] = str(traced.jaxpr).count("= exp ")
    for remat in ("attention", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found[remat], found["none"])
    assert exponentials["attention"] == exponentials["none"] < exponentials["full"]
    with pytest.raises(ValueError, match="remat='some' is unknown"):
        UNet(remat="some")


def test_older_names_are_read():
    module = models.create("sd15/vae", block_out_channels=(8, 8), norm_num_groups=4)
    params = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = convert.to_torch(module, params)
    for name in [name for name in arrays if "attentions" in name]:
        older = name
        for now, then in new.items():
            older = older.replace(f".{now}.", f".{then}.")
        arrays[older] = arrays.pop(name)
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(module, arrays), params)


def test_posterior_draws_with_its_own_moments():
    mean, logvar = jnp.full((2, 64, 64, 1), 3.0), jnp.full((2, 64, 64, 1), -2.0)
    posterior = vae.Posterior(mean, logvar)
    draws = np.asarray(posterior.sample(jax.random.split(jax.random.key(0), 2)))
    assert abs(draws.mean() - 3) < 0.02 and abs(draws.std() - np.exp(-1)) < 0.01
    assert not np.array_equal(draws[0], draws[1])


def test_tiles_join_without_seams():
    """A decoder that only enlarges has no context to lose: tiles must give its very picture."""
    z = np.random.default_rng(0).normal(size=(2, 40, 70, 4)).astype(np.float32)
    enlarge = lambda z: np.repeat(np.repeat(z, 8, axis=1), 8, axis=2)  # noqa: E731
    tiled = vae.decode_tiled(enlarge, z, downscale=8, tile=24, overlap=6)
    np.testing.assert_allclose(tiled, enlarge(z), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_full_size_unet_equals_diffusers():
    with torch.no_grad():
        peer = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    module, _ = compare_unet(peer, (1, 64, 64, 4), (77, 768), DTYPES["fp32"])
    assert module == models.create("sd15/unet")


@pytest.mark.slow
def test_full_size_vae_equals_diffusers():
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    compare_vae(
        AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **levels),
        (1, 256, 320, 3),
        DTYPES["fp32"],
    )


@pytest.mark.slow
def test_full_size_text_encoder_equals_transformers():
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    compare_text(config, 77, DTYPES["fp32"])
