"""DiT: sizes, initialisation, and the forward pass beside diffusers' DiTTransformer2DModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import attention, layers, tree

COUNTS = {  # parameters, GMAC of a forward pass (arXiv:2212.09748, table 1)
    "DiT-S/2": (32_963_360, 6.06),
    "DiT-S/4": (32_945_024, 1.41),
    "DiT-S/8": (33_148_160, 0.36),
    "DiT-B/2": (130_512_416, 23.0),
    "DiT-B/4": (130_475_648, 5.57),
    "DiT-B/8": (130_881_536, 1.42),
    "DiT-L/2": (458_102_816, 80.7),
    "DiT-L/4": (458_053_760, 19.7),
    "DiT-L/8": (458_594_816, 5.01),
    "DiT-XL/2": (675_129_632, 118.6),
    "DiT-XL/4": (675_074_432, 29.0),
    "DiT-XL/8": (675_683_072, 7.39),
}
ODD = {"image_size": 15, "channels": 3, "num_classes": 7, "patch_size": 3, "width": 60, "depth": 3, "heads": 5}
SMALL = {"image_size": 8, "num_classes": 5, "width": 32, "depth": 3, "heads": 4}


def _init(model):
    return jax.jit(model.init)(jax.random.key(0), *model.dummy_inputs())["params"]


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]


def _random(model, seed=0):
    """Weights that are nowhere zero; pos_embed as it is."""
    rng = np.random.default_rng(seed)
    params = tree.map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.normal(size=leaf.shape) * (0.7 / np.sqrt(leaf.shape[-2]) if path.endswith("kernel") else 0.05),
            jnp.float32,
        ),
        _shapes(model),
    )
    grid = model.image_size // model.patch_size
    return params | {"pos_embed": jnp.asarray(layers.sincos_positions_2d(model.width, grid, grid)[None], jnp.float32)}


def _inputs(model, batch=2, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, model.image_size, model.image_size, model.channels)).astype(dtype)
    t = np.asarray([3, 981, 400, 57][:batch], np.int32)
    return x, t, np.asarray([0, model.num_classes, 2, 1][:batch], np.int32)


def _state_dict(params):
    """Our tree under diffusers' names and layouts; the embedders are repeated in every block."""
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    emb = {"timestep_embedder.linear_1": "t_embedder/mlp_0", "timestep_embedder.linear_2": "t_embedder/mlp_2"}
    ends = {"proj_out_1": "final_adaLN_modulation", "proj_out_2": "final_linear"}
    of_block = {"attn1.to_out.0": "attn/proj", "ff.net.0.proj": "mlp/fc1", "ff.net.2": "mlp/fc2"}
    out = {
        "pos_embed.proj.weight": flat["x_embedder/kernel"].transpose(3, 2, 0, 1),
        "pos_embed.proj.bias": flat["x_embedder/bias"],
    }

    def linear(theirs, kernel, bias):
        out[f"{theirs}.weight"], out[f"{theirs}.bias"] = kernel.T, bias

    for theirs, ours in ends.items():
        linear(theirs, flat[f"{ours}/kernel"], flat[f"{ours}/bias"])
    for i in range(len(flat["adaLN_modulation/kernel"])):
        block = f"transformer_blocks.{i}"
        for theirs, ours in emb.items():
            linear(f"{block}.norm1.emb.{theirs}", flat[f"{ours}/kernel"], flat[f"{ours}/bias"])
        out[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = flat["y_embedder/embedding"]
        linear(f"{block}.norm1.linear", flat["adaLN_modulation/kernel"][i], flat["adaLN_modulation/bias"][i])
        kernels, biases = (np.split(flat[f"blocks/attn/qkv/{x}"][i], 3, axis=-1) for x in ("kernel", "bias"))
        for part, kernel, bias in zip("qkv", kernels, biases, strict=True):
            linear(f"{block}.attn1.to_{part}", kernel, bias)
        for theirs, ours in of_block.items():
            linear(f"{block}.{theirs}", flat[f"blocks/{ours}/kernel"][i], flat[f"blocks/{ours}/bias"][i])
    return out


def _peer(model, params, dtype):
    """diffusers' model with our weights. Its frequencies are i / 127 where DiT's own are i / 128 (`downscale_freq_shift=1`), and
    it makes them in fp32: both are set right here, unless our model has `freq_shift=1`, which is to equal it as it is."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    class Sinusoids(torch.nn.Module):
        def forward(self, t):
            args = t.to(dtype)[:, None] * torch.exp(-np.log(10_000.0) * torch.arange(128, dtype=torch.float64) / 128)
            return torch.cat([torch.cos(args), torch.sin(args)], dim=-1).to(dtype)

    peer = diffusers.DiTTransformer2DModel(
        num_attention_heads=model.heads,
        attention_head_dim=model.width // model.heads,
        in_channels=model.channels,
        out_channels=model.channels * (1 + model.learn_sigma),
        num_layers=model.depth,
        sample_size=model.image_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    )
    peer.load_state_dict({name: torch.tensor(value) for name, value in _state_dict(params).items()})
    np.testing.assert_allclose(peer.pos_embed.pos_embed, params["pos_embed"], atol=1e-6)
    peer.pos_embed.pos_embed.copy_(torch.tensor(np.asarray(params["pos_embed"])))
    peer = peer.eval().to(dtype)
    for block in peer.transformer_blocks if not model.freq_shift else ():
        block.norm1.emb.time_proj = Sinusoids()

    @torch.no_grad()
    def forward(x, t, y):
        x = torch.tensor(x.transpose(0, 3, 1, 2)).to(dtype)
        return peer(x, torch.tensor(t), torch.tensor(y), return_dict=False)[0].permute(0, 2, 3, 1).double().numpy()

    forward.model = peer
    return forward


def _apply(model, params, *inputs):
    return np.asarray(jax.jit(model.apply)({"params": params}, *inputs), np.float64)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_macs_are_the_papers(name):
    model = jdiff.create(name)
    count, gmacs = COUNTS[name]
    assert tree.count(_shapes(model)) == count
    assert model.macs() / 1e9 == pytest.approx(gmacs, rel=0.015)


def test_every_model_is_listed():
    assert set(jdiff.list_models()) >= set(COUNTS)


@pytest.mark.parametrize(
    "overrides",
    [{}, ODD, {"freq_shift": 1}, {**ODD, "freq_shift": 1}],
    ids=["DiT-S/2", "odd", "DiT-S/2 of diffusers untouched", "odd of diffusers untouched"],
)
def test_forward_is_diffusers(overrides):
    torch = pytest.importorskip("torch")
    model = jdiff.create("DiT-S/2", **overrides)
    params, inputs = _random(model), _inputs(model)
    expected = _peer(model, params, torch.float32)(*inputs)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(_apply(model, params, *inputs), expected, rtol=0, atol=1e-4)
    low = _apply(jdiff.create("DiT-S/2", dtype=jnp.bfloat16, **overrides), params, *inputs)
    assert np.linalg.norm(low - expected) / np.linalg.norm(expected) < 3e-2


@pytest.mark.parametrize("overrides", [{"depth": 2, "learn_sigma": False}, ODD], ids=["DiT-S/2", "odd"])
def test_forward_is_diffusers_in_float64(overrides):
    torch = pytest.importorskip("torch")
    model = jdiff.create("DiT-S/2", **overrides)
    params, inputs = _random(model), _inputs(model, dtype=np.float64)
    expected = _peer(model, params, torch.float64)(*inputs)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        x, t, y = inputs
        found = _apply(model, wide, jnp.asarray(x), jnp.asarray(t, jnp.float64), y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("overrides", [{"depth": 2}, {**ODD, "remat": "none"}], ids=["DiT-S/2", "odd"])
def test_gradients_are_pytorchs_in_float64(overrides):
    torch = pytest.importorskip("torch")
    model = jdiff.create("DiT-S/2", **overrides)
    params, (x, t, y) = _random(model), _inputs(model, dtype=np.float64)
    peer = _peer(model, params, torch.float64).model
    out = peer(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(y), return_dict=False)[0]
    out.sin().mean().backward()
    expected = {name: value.grad.numpy() for name, value in peer.named_parameters() if value.grad is not None}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        loss = lambda p: jnp.sin(model.apply({"params": p}, jnp.asarray(x), jnp.asarray(t, jnp.float64), y)).mean()  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(wide)
    found = _state_dict(jax.tree.map(np.asarray, gradient))
    norm = np.sqrt(sum(np.square(value).sum() for value in expected.values()))
    for name, value in expected.items():
        if ".norm1.emb." in name:  # diffusers keeps a copy of the embedders in every block; ours serves them all
            tail = name.split(".", 2)[2]
            value = sum(v for k, v in expected.items() if k.split(".", 2)[-1] == tail)
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-10 * norm, err_msg=name)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        *((True, "full"), (False, "dots")),
        *(pytest.param(*how, marks=pytest.mark.slow) for how in ((True, "none"), (False, "none"), (False, "full"))),
    ],
)
def test_how_the_blocks_run_changes_nothing(scan_layers, remat):
    def value_and_gradient(**how):
        model = jdiff.create("DiT-S/2", **SMALL, **how)
        loss = lambda params: jnp.mean(jnp.sin(model.apply({"params": params}, *inputs)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    model = jdiff.create("DiT-S/2", **SMALL)
    params, inputs = _random(model), _inputs(model)
    value, gradient = value_and_gradient()
    found, found_gradient = value_and_gradient(scan_layers=scan_layers, remat=remat)
    assert float(found) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    assert not tree.differences(gradient, found_gradient)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for path, leaf in tree.flatten(gradient).items():
        np.testing.assert_allclose(tree.flatten(found_gradient)[path], leaf, rtol=1e-4, atol=1e-5 * scale, err_msg=path)


def test_written_out_gradients_are_the_derivatives():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(2, n, 3, 8)) for n in (5, 7, 7, 5))
    x = np.linspace(-6, 6, 41)

    def plain(q, k, v):
        p = jax.nn.softmax(jnp.einsum("BLNK,BSNK->BNLS", q, k) / np.sqrt(q.shape[-1]), axis=-1)
        return jnp.einsum("BNLS,BSNK->BLNK", p, v)

    with jax.enable_x64(True):
        np.testing.assert_allclose(attention.attention(q, k, v), plain(q, k, v), atol=1e-12)
        found, expected = (jax.vjp(f, q, k, v)[1](jnp.asarray(g)) for f in (attention.attention, plain))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
        np.testing.assert_allclose(layers.gelu_tanh(x), jax.nn.gelu(x, approximate=True), atol=1e-12)
        found, expected = (
            jax.grad(lambda x, f=f: f(x).sum())(jnp.asarray(x))
            for f in (layers.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True))
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_large_scores_do_not_overflow():
    q = np.full((1, 2, 1, 4), 1e3, np.float32)
    out, back = jax.vjp(attention.attention, q, q, q)
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in back(out))


def test_initialisation_is_the_official_one():
    model = jdiff.create("DiT-S/2", depth=2)
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(_init(model)).items()}
    D, F, patch = model.width, 4 * model.width, 2 * 2 * model.channels
    bounds = {
        "x_embedder/kernel": np.sqrt(6 / (patch + D)),
        "blocks/attn/qkv/kernel": np.sqrt(6 / (4 * D)),
        "blocks/attn/proj/kernel": np.sqrt(6 / (2 * D)),
        "blocks/mlp/fc1/kernel": np.sqrt(6 / (D + F)),
        "blocks/mlp/fc2/kernel": np.sqrt(6 / (D + F)),
    }
    normal = ("t_embedder/mlp_0/kernel", "t_embedder/mlp_2/kernel", "y_embedder/embedding")
    for path, value in flat.items():
        if path in bounds:
            assert np.abs(value).max() <= bounds[path]
            assert np.abs(value).max() > 0.999 * bounds[path]
            assert value.std() == pytest.approx(bounds[path] / np.sqrt(3), rel=0.02)
        elif path in normal:
            assert value.std() == pytest.approx(0.02, rel=0.02)
            assert abs(value.mean()) < 2e-4
        elif path != "pos_embed":
            assert not value.any(), path
    kernels = flat["blocks/attn/qkv/kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_positions_are_sines_of_the_column_then_of_the_row():
    model = jdiff.create("DiT-S/2", **ODD)
    grid, quarter = 5, ODD["width"] // 4
    found = np.asarray(_init(model)["pos_embed"])[0]
    for row in range(grid):
        for column in range(grid):
            expected = []
            for position in (column, row):
                args = [position / 10_000 ** (i / quarter) for i in range(quarter)]
                expected += [np.sin(a) for a in args] + [np.cos(a) for a in args]
            np.testing.assert_allclose(found[row * grid + column], expected, atol=1e-6)


def test_a_new_model_predicts_zero():
    model = jdiff.create("DiT-S/2", **SMALL)
    assert not _apply(model, _init(model), *_inputs(model)).any()


def test_qk_norm_bounds_the_scores():
    model = jdiff.create("DiT-S/2", **SMALL, qk_norm=True)
    params, inputs = _random(model), _inputs(model)
    norms = [path for path in tree.flatten(params) if "_norm/" in path]
    assert sorted(norms) == ["blocks/attn/k_norm/scale", "blocks/attn/q_norm/scale"]
    for path in ("q_norm", "k_norm"):
        params["blocks"]["attn"][path]["scale"] += 1.0
    out = _apply(model, params, *inputs)
    params["blocks"]["attn"]["qkv"]["bias"] *= 0.0
    once = _apply(model, params, *inputs)
    params["blocks"]["attn"]["qkv"]["kernel"] = params["blocks"]["attn"]["qkv"]["kernel"].at[..., :64].mul(100.0)
    np.testing.assert_allclose(_apply(model, params, *inputs), once, atol=1e-3)  # the length of q and k does not matter
    assert np.isfinite(out).all()


def test_label_dropout_adds_the_null_label():
    assert jdiff.create("DiT-S/2", num_classes=7).null_label == 7
    plain = jdiff.create("DiT-S/2", num_classes=7, label_dropout=0.0)
    assert plain.null_label is None
    assert _shapes(plain)["y_embedder"]["embedding"].shape == (7, 384)


def test_output_channels_follow_learn_sigma():
    for learn_sigma, channels in ((True, 8), (False, 4)):
        model = jdiff.create("DiT-S/2", **SMALL, learn_sigma=learn_sigma)
        out = jax.eval_shape(model.init_with_output, jax.random.key(0), *_inputs(model))[0]
        assert out.shape == (2, 8, 8, channels)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("DiT-S/3", {}, "did you mean 'DiT-S/"),
        ("DiT-S/2", {"widht": 64}, "did you mean 'width'"),
        ("DiT-S/2", {"image_size": 33}, "image_size=33 is not a multiple of patch_size=2"),
        ("DiT-S/2", {"width": 384, "heads": 7}, "width=384 is not a multiple of heads=7"),
        ("DiT-S/2", {"width": 30, "heads": 3}, "multiple of 4"),
        ("DiT-S/2", {"remat": "some"}, "remat='some' is unknown"),
    ],
)
def test_bad_settings_are_named(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        jdiff.create(name, **overrides)


def test_a_picture_of_another_size_is_refused():
    model = jdiff.create("DiT-S/2", **SMALL)
    with pytest.raises(ValueError, match=r"takes pictures of \(8, 8, 4\), found \(6, 8, 4\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 8, 4)), *_inputs(model)[1:])
