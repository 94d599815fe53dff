"""Recipes over whole models: what they choose and save, against qwix, and that they go with adapters and training."""

import re
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from test_qtensor import integer_products

from jdiff import lora, models, quant, tree, weights
from jdiff.models import dit
from jdiff.qtensor import QTensor, Rounded
from jdiff.weights import LoRAWeight

SMALL = {
    "dit": ("DiT-S/2", {"image_size": 8, "num_classes": 10, "width": 64, "depth": 2, "heads": 4}),
    "unet": (
        "sd15/unet",
        {"block_out_channels": (64, 128), "attention": (True, False), "heads": (4, 4), "layers_per_block": 1},
    ),
}

DYNAMIC = ("w8a8", "w8", "w4")
"""Recipes that nothing has to be seen for."""


def _shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]


def _make(kind):
    """(module, parameters of some contrast, inputs)."""
    name, fields = SMALL[kind]
    module, rng = models.create(name, **fields), np.random.default_rng(0)
    leaf = lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[-2:-1])), x.dtype)  # noqa: E731
    params = jax.tree.map(leaf, _shapes(module))
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32)
    y = jnp.asarray([1, 2]) if kind == "dit" else jnp.asarray(rng.normal(size=(2, 7, 768)), jnp.float32)
    return module, params, (x, jnp.asarray([20.0, 700.0]), y)


def _parts(module):
    return module.concatenated() if hasattr(module, "concatenated") else {}


def _error(found, exact):
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


@cache
def _outputs(kind):
    """The exact output, and that of each recipe."""
    module, params, inputs = _make(kind)
    apply = jax.jit(lambda params: module.apply({"params": params}, *inputs))
    recipes = {name: quant.quantize(params, quant.RECIPES[name][kind], _parts(module)) for name in DYNAMIC}
    return apply(params), {name: apply(quantized) for name, quantized in recipes.items()}


@pytest.mark.parametrize("kind", SMALL)
def test_models_take_a_quantized_tree(kind):
    """The error is small, and grows from w8 to w8a8 to w4."""
    exact, outputs = _outputs(kind)
    errors = {name: _error(output, exact) for name, output in outputs.items()}
    assert errors["w8"] < errors["w8a8"] < errors["w4"]
    assert errors["w8a8"] < 0.03 and errors["w4"] < 0.3


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_kept_is_not_copied(kind):
    """Biases, norms, first and last layers are the same arrays."""
    module, params, _ = _make(kind)
    first_and_last = {"dit": ("x_embedder", "final_linear"), "unet": ("conv_in", "conv_out")}[kind]
    for recipe in (quant.RECIPES[name] for name in DYNAMIC):
        quantized = weights.flatten(quant.quantize(params, recipe[kind], _parts(module)))
        kept = {path for path, leaf in quantized.items() if not isinstance(leaf, QTensor)}
        assert all(quantized[path] is weights.flatten(params)[path] for path in kept)
        assert {f"{layer}/kernel" for layer in first_and_last} < kept
        assert not [path for path in kept if re.search("attn|resnets.*conv", path) and path.endswith("kernel")]


def test_the_compiled_models_multiply_integers():
    """DiT's four products a block (a loop holds them once); all the UNet's but the time path, first and last."""
    module, params, inputs = _make("dit")
    programs = {}
    for kind in SMALL:
        module, params, inputs = _make(kind)
        quantized = quant.quantize(params, quant.RECIPES["w8a8"][kind], _parts(module))
        apply = jax.jit(lambda params, *x, module=module: module.apply({"params": params}, *x))
        programs[kind] = integer_products(apply.lower(quantized, *inputs).compile().as_text())
    assert programs["dit"] == (4, 0)
    chosen = [leaf for leaf in weights.flatten(quantized).values() if isinstance(leaf, QTensor) and leaf.integer]
    products = [(len(w.qvalue.shape) == 2 or w.shape[:2] == (1, 1), max(1, len(w.sizes))) for w in chosen]
    assert programs["unet"] == tuple(sum(n for is_dot, n in products if is_dot == kind) for kind in (True, False))


@pytest.mark.parametrize("kind", SMALL)
def test_a_tree_of_shapes_is_quantized_too(kind):
    module, params, _ = _make(kind)
    for recipe in (quant.RECIPES[name] for name in DYNAMIC):
        made = quant.quantize(params, recipe[kind], _parts(module))
        shapes = jax.eval_shape(lambda p, rules=recipe[kind]: quant.quantize(p, rules, _parts(module)), _shapes(module))
        assert not tree.differences(made, shapes)
        assert jax.tree.structure(made) == jax.tree.structure(shapes)
        lines = quant.describe(_shapes(module), recipe[kind])
        assert (
            sum(line.before for line in lines) == quant.size(params) == sum(x.nbytes for x in jax.tree.leaves(params))
        )
        assert sum(line.arrays for line in lines) == len(jax.tree.leaves(params))
        whole = quant.quantize(params, recipe[kind])
        assert sum(line.after for line in lines) == quant.size(whole)


@pytest.mark.parametrize(("name", "kind"), [("DiT-XL/2", "dit"), ("sd15/unet", "unet")])
def test_full_sizes_shrink(name, kind):
    """Bytes of all arrays of the real models, by their shapes."""
    module = models.create(name)
    shapes = _shapes(module)
    share = {}
    for recipe, rules in ((name, quant.RECIPES[name]) for name in DYNAMIC):
        made = jax.eval_shape(lambda p, rules=rules[kind]: quant.quantize(p, rules, _parts(module)), shapes)
        share[recipe] = quant.size(shapes) / quant.size(made)
    assert share["w8a8"] >= 3.8 and share["w8"] >= 3.8
    assert share["w4"] > 1.2 * share["w8"]


def test_the_unets_concatenations():
    """The two parts are what the model concatenates, and each has its own scale in the activations and in the kernel."""
    module, params, inputs = _make("unet")
    parts = module.concatenated()
    assert {path: sum(sizes) for path, sizes in parts.items()} == {
        path: leaf.shape[-2] for path, leaf in tree.flatten(params).items() if path in parts
    }
    joined = [path for path in tree.flatten(params) if re.fullmatch(r"up_blocks.*(conv1|conv_shortcut)/kernel", path)]
    assert set(joined) == set(parts)
    seen = []
    concatenate = jnp.concatenate
    with mock.patch(
        "jax.numpy.concatenate", lambda xs, axis=0: (seen.append(tuple(x.shape for x in xs)), concatenate(xs, axis))[1]
    ):
        jax.eval_shape(module.apply, {"params": params}, *inputs)
    pictures = [tuple(shape[-1] for shape in shapes) for shapes in seen if all(len(shape) == 4 for shape in shapes)]
    assert pictures == [sizes for path, sizes in parts.items() if path.endswith("conv1/kernel")]

    path = joined[1]
    hidden, skip = parts[path]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, hidden + skip)), jnp.float32)
    x = x.at[..., :hidden].multiply(50)  # as in Stable Diffusion, where the one is much larger than the other
    kernel = tree.flatten(params)[path]
    rules = ((r".*", "w8a8"),)
    one, two = (quant.quantize({path: kernel}, rules, p)[path] for p in ({}, parts))
    y_skip = lambda w: weights.conv(x, w)[0] - weights.conv(x.at[..., hidden:].set(0), w)[0]  # noqa: E731
    assert _error(y_skip(two), y_skip(kernel)) < _error(y_skip(one), y_skip(kernel)) / 10


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"block/.*", "w8"),), r"rule 'block/.\*' gets no array: it matches none of"),
        (((r".*", "high"), (r"blocks/.*", "w8")), r"rule 'blocks/.\*' gets no array: rules before it take all"),
        (((r"blocks/.*", "w9"),), r"has the scheme 'w9'; use one of \['high', 'w8', 'w8a8', 'w8a8-static', 'w4'\]"),
        (((r"blocks/attn/qkv/bias", "w8"), (r"x_embedder/bias", "w8")), r"x_embedder/bias has the shape \(64,\)"),
        (((r"x_embedder/kernel", "w4"),), r"x_embedder/kernel has 4 inputs, no multiple of the 64"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        quant.choose(_shapes(_make("dit")[0]), rules)


def test_recipes_and_trees_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"quantize='w8a9' is unknown \(did you mean 'w8a8'\?\)"):
        quant.find_recipe("w8a9")
    _, params, _ = _make("dit")
    rules = quant.RECIPES["w8"]["dit"]
    with pytest.raises(ValueError, match="adaLN_modulation/kernel is quantized already"):
        quant.quantize(quant.quantize(params, rules), rules)


def test_adapters_stay_around_their_kernels():
    """Quantizing a tree with adapters attached is attaching them to a quantized one."""
    module, params, inputs = _make("dit")
    rules = quant.RECIPES["w8a8"]["dit"]
    adapters = lora.init(jax.random.key(1), params, [lora.Rule("attn", 2)], method="gaussian")
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    after = quant.quantize(lora.attach(params, adapters, 1.0), rules)
    before = lora.attach(quant.quantize(params, rules), adapters, 1.0)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert isinstance(after["blocks"]["attn"]["qkv"]["kernel"], LoRAWeight)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    y, plain = (module.apply({"params": p}, *inputs) for p in (after, quant.quantize(params, rules)))
    assert _error(y, plain) > 0.01


def test_training_goes_through_the_integers():
    """`train`'s model is the quantized one; its float kernels have a gradient, near the float model's."""
    module, params, inputs = _make("dit")
    rules = quant.RECIPES["w8a8"]["dit"]
    apply = lambda params: module.apply({"params": params}, *inputs)  # noqa: E731
    training = quant.train(params, rules)
    assert isinstance(training["blocks"]["mlp"]["fc1"]["kernel"], Rounded)
    np.testing.assert_allclose(
        jax.jit(apply)(training), jax.jit(apply)(quant.quantize(params, rules)), rtol=1e-4, atol=1e-4
    )
    loss = lambda params: jnp.mean(jnp.square(apply(params)))  # noqa: E731
    found, exact = jax.jit(jax.grad(loss))(training), jax.jit(jax.grad(loss))(params)
    kernels = {
        path: (leaf.w, tree.flatten(exact)[path])
        for path, leaf in weights.flatten(found).items()
        if isinstance(leaf, Rounded)
    }
    assert len(kernels) == 6
    assert max(_error(*pair) for pair in kernels.values()) < 0.1


class _Plain:
    """qwix finds a parameter by following it to the product, and our products on a CPU take turns that it does not."""

    @staticmethod
    def dot(x, w, follows=False):
        return jnp.dot(x, w)

    @staticmethod
    def split_dot(x, w, parts):
        return jnp.split(jnp.dot(x, w), parts, axis=-1)

    @staticmethod
    def conv(x, w, strides=(1, 1), padding="SAME"):
        return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _plain_products():
    return mock.patch.multiple("jdiff.layers.weights", dot=_Plain.dot, split_dot=_Plain.split_dot, conv=_Plain.conv)


def _by_qwix(module, params, inputs, rules):
    with _plain_products():
        theirs = qwix.quantize_model(module, qwix.PtqProvider(rules))
        shapes = jax.eval_shape(theirs.init, jax.random.key(0), *inputs)["params"]
        quantized = qwix.quantize_params(params, shapes)
        return jax.jit(theirs.apply)({"params": quantized}, *inputs)


LAYERS = r"attn/(qkv|proj)|mlp/fc[12]"
INT8 = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8}
UNET_RULES = [
    qwix.QuantizationRule(module_path=r"conv_in|conv_out|time_embedding/.*"),
    qwix.QuantizationRule(module_path=r".*/time_emb_proj", weight_qtype=jnp.int8),
    qwix.QuantizationRule(module_path=r".*", op_names=("dot_general", "conv_general_dilated"), **INT8),
]


@pytest.mark.parametrize(
    ("scheme", "theirs"),
    [("w8a8", (jnp.int8, jnp.int8, None)), ("w8", (jnp.int8, None, None)), ("w4", (jnp.int4, None, 64))],
)
def test_a_block_errs_as_qwix_does(scheme, theirs):
    """A transformer block without its scan, which qwix does not take."""
    block, rng = dit.Block(4, 256), np.random.default_rng(0)
    inputs = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 16, 128), (2, 6 * 128)))
    params = jax.jit(block.init)(jax.random.key(0), *inputs)["params"]
    run = lambda params: block.apply({"params": params}, *inputs)[0]  # noqa: E731
    exact, ours = run(params), run(quant.quantize(params, ((rf"({LAYERS})/kernel", scheme),)))
    weight, activation, tile = theirs
    rule = qwix.QuantizationRule(module_path=LAYERS, weight_qtype=weight, act_qtype=activation, tile_size=tile)
    peer = _by_qwix(block, params, inputs, [rule])[0]
    np.testing.assert_allclose(_error(ours, exact), _error(peer, exact), rtol=0.1)


@pytest.mark.slow
def test_a_unet_errs_as_qwix_does():
    """With its scales, one a picture in 1x1 convolutions too; with ours, one a pixel and two at concatenations, it errs less."""
    module, params, inputs = _make("unet")
    exact, outputs = _outputs("unet")
    with mock.patch("jdiff.qtensor._pointwise", lambda *_: False):
        quantized = quant.quantize(params, quant.RECIPES["w8a8"]["unet"])
        ours = jax.jit(lambda params: module.apply({"params": params}, *inputs))(quantized)
    peer = _by_qwix(module, params, inputs, UNET_RULES)
    np.testing.assert_allclose(_error(ours, exact), _error(peer, exact), rtol=0.1)
    assert _error(outputs["w8a8"], exact) < _error(ours, exact)


@pytest.mark.slow
def test_dit_xl_errs_as_qwix_does():
    """All 28 blocks of DiT-XL/2 one after another, each with weights of its own."""
    model = models.create("DiT-XL/2")
    D, rng = model.width, np.random.default_rng(0)
    block = dit.Block(model.heads, int(D * model.mlp_ratio))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    x, modulation = normal(1, 16, D), 0.5 * normal(1, 6 * D)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, modulation)["params"]
    rules = [qwix.QuantizationRule(module_path=LAYERS, **INT8)]
    apply = jax.jit(lambda params, x: block.apply({"params": params}, x, modulation)[0])
    theirs = qwix.quantize_model(block, qwix.PtqProvider(rules))
    with _plain_products():
        rounded = jax.eval_shape(theirs.init, jax.random.key(0), x, modulation)["params"]
        by_qwix = jax.jit(lambda params, x: theirs.apply({"params": params}, x, modulation)[0])
        by_qwix(qwix.quantize_params(jax.tree.map(jnp.zeros_like, shapes), rounded), x)
    exact = ours = peer = x
    for _ in range(model.depth):
        params = jax.tree.map(lambda s: normal(*s.shape) / np.sqrt(s.shape[0]), shapes)
        exact, ours = apply(params, exact), apply(quant.quantize(params, ((rf"({LAYERS})/kernel", "w8a8"),)), ours)
        peer = by_qwix(qwix.quantize_params(params, rounded), peer)
    assert _error(ours, exact) > 1e-3
    np.testing.assert_allclose(_error(ours, exact), _error(peer, exact), rtol=0.1)


@pytest.mark.slow
def test_stable_diffusions_unet_errs_as_qwix_does():
    """SD 1.5's widths and levels, as the small one above; a block a level and not two, so that it takes 5 GB of memory."""
    module, rng = models.create("sd15/unet", layers_per_block=1), np.random.default_rng(0)
    leaf = lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) / np.sqrt(np.prod(s.shape[-2:-1])))  # noqa: E731
    params = jax.tree.map(leaf, _shapes(module))
    x, context = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((1, 8, 8, 4), (1, 7, 768)))
    inputs = (x, jnp.asarray([300.0]), context)
    apply = jax.jit(lambda params: module.apply({"params": params}, *inputs))
    exact = np.asarray(apply(params))
    with mock.patch("jdiff.qtensor._pointwise", lambda *_: False):
        ours = np.asarray(apply(quant.quantize(params, quant.RECIPES["w8a8"]["unet"])))
    jax.clear_caches()
    peer = _by_qwix(module, params, inputs, UNET_RULES)
    np.testing.assert_allclose(_error(ours, exact), _error(peer, exact), rtol=0.1)
