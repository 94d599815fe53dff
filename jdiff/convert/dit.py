"""DiT and SiT: the official names (facebookresearch/DiT, willisma/SiT) and those of diffusers' DiTTransformer2DModel."""

import math
from typing import Any

import numpy as np

from jdiff.convert.rows import Row, Sizes, refuse, size
from jdiff.layers import sincos_positions_2d
from jdiff.models.dit import SIZES

OFFICIAL = (
    Row(r"pos_embed", "pos_embed"),
    Row(r"x_embedder", "x_embedder.proj"),
    Row(r"t_embedder/mlp_(\d)", r"t_embedder.mlp.\1"),
    Row(r"y_embedder", "y_embedder.embedding_table"),
    Row(r"adaLN_modulation", "blocks.{layer}.adaLN_modulation.1"),
    Row(r"blocks/(attn|mlp)/(\w+)", r"blocks.{layer}.\1.\2"),
    Row(r"final_adaLN_modulation", "final_layer.adaLN_modulation.1"),
    Row(r"final_linear", "final_layer.linear"),
)

_MLP = {"0": "1", "2": "2"}
DIFFUSERS = (
    Row(r"pos_embed", None),  # not stored: diffusers makes it again
    Row(r"x_embedder", "pos_embed.proj"),
    # every block has its copy of the two embedders
    Row(
        r"t_embedder/mlp_(\d)",
        lambda _, n: f"transformer_blocks.{{copy}}.norm1.emb.timestep_embedder.linear_{_MLP[n]}",
    ),
    Row(r"y_embedder", "transformer_blocks.{copy}.norm1.emb.class_embedder.embedding_table"),
    Row(r"adaLN_modulation", "transformer_blocks.{layer}.norm1.linear"),
    Row(r"blocks/attn/qkv", "transformer_blocks.{layer}.attn1.to_{qkv}"),
    Row(r"blocks/attn/proj", "transformer_blocks.{layer}.attn1.to_out.0"),
    Row(r"blocks/mlp/fc1", "transformer_blocks.{layer}.ff.net.0.proj"),
    Row(r"blocks/mlp/fc2", "transformer_blocks.{layer}.ff.net.2"),
    Row(r"final_adaLN_modulation", "proj_out_1"),
    Row(r"final_linear", "proj_out_2"),
)


def derived(module: Any, path: str) -> np.ndarray:
    """The leaf that diffusers does not store: float32 positions (1, L, D), as `DiT` initialises them."""
    assert path == "pos_embed"
    grid = module.image_size // module.patch_size
    return sincos_positions_2d(module.width, grid, grid)[None].astype(np.float32)


def infer(sizes: Sizes, heads: int | None) -> dict[str, Any]:
    """`DiT`'s fields from the official names' shapes.

    The number of heads cannot be seen in them: it is the papers' for their widths, else `heads` has to say it. One row of the
    label table is taken for the unconditional label, as the official code has it.
    """
    width, channels, patch, _ = size(sizes, "x_embedder.proj.weight", 4)
    _, tokens, _ = size(sizes, "pos_embed", 3)
    depth = 1 + max((int(name.split(".")[1]) for name in sizes if name.startswith("blocks.")), default=0)
    rows, _ = size(sizes, "y_embedder.embedding_table.weight", 2)
    hidden, _ = size(sizes, "blocks.0.mlp.fc1.weight", 2)
    out, _ = size(sizes, "final_layer.linear.weight", 2)
    known = {shape["width"]: shape["heads"] for shape in SIZES.values()}
    if heads is None and width not in known:
        raise refuse(
            f"a DiT of width {width} is none of the paper's, and its number of heads is not stored: give heads"
        )
    side = math.isqrt(tokens)
    if side * side != tokens or not width or not patch or not channels or hidden % width:
        raise refuse(f"no DiT has {tokens} positions of width {width} with an MLP of {hidden}")
    return {
        "image_size": side * patch,
        "channels": channels,
        "num_classes": rows - 1,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": heads or known[width],
        "mlp_ratio": hidden / width,
        "learn_sigma": out == 2 * patch * patch * channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in sizes,
    }
