"""AutoencoderKL: diffusers' names, and CompVis' (`decoder.up` counted from the picture; attention as 1x1 convolutions)."""

import re
from typing import Any

from jdiff.convert.rows import Row, Sizes, count, size
from jdiff.convert.unet import DIFFUSERS as DIFFUSERS

OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def old_attention(name: str) -> str:
    """diffusers' name of an array as versions before 0.17 wrote it."""
    for now, then in OLD_ATTENTION:
        name = name.replace(f"mid_block.attentions.0.{now}.", f"mid_block.attentions.0.{then}.")
    return name


def _resnet(rest: str) -> str:
    return "nin_shortcut" if rest == "conv_shortcut" else rest


def _up(module: Any, level: str) -> int:
    return len(module.block_out_channels) - 1 - int(level)


_HALF = r"(encoder|decoder)"
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out_0": "proj_out"}
COMPVIS = (
    Row(
        r"encoder/down_blocks_(\d+)/resnets_(\d+)/(\w+)", lambda _, i, j, x: f"encoder.down.{i}.block.{j}.{_resnet(x)}"
    ),
    Row(r"encoder/down_blocks_(\d+)/downsamplers_0/conv", r"encoder.down.\1.downsample.conv"),
    Row(
        r"decoder/up_blocks_(\d+)/resnets_(\d+)/(\w+)",
        lambda module, i, j, x: f"decoder.up.{_up(module, i)}.block.{j}.{_resnet(x)}",
    ),
    Row(r"decoder/up_blocks_(\d+)/upsamplers_0/conv", lambda module, i: f"decoder.up.{_up(module, i)}.upsample.conv"),
    Row(
        rf"{_HALF}/mid_block/resnets_([01])/(\w+)", lambda _, half, n, x: f"{half}.mid.block_{int(n) + 1}.{_resnet(x)}"
    ),
    Row(rf"{_HALF}/mid_block/attentions_0/group_norm", r"\1.mid.attn_1.norm"),
    Row(
        rf"{_HALF}/mid_block/attentions_0/(to_\w+)",
        lambda _, half, x: f"{half}.mid.attn_1.{_ATTENTION[x]}",
        pointwise=True,
    ),
    Row(rf"{_HALF}/conv_norm_out", r"\1.norm_out"),
    Row(rf"{_HALF}/(conv_in|conv_out)", r"\1.\2"),
    Row(r"(quant_conv|post_quant_conv)", r"\1"),
)


def infer(sizes: Sizes, heads: int | None = None) -> dict[str, Any]:
    """`AutoencoderKL`'s fields from CompVis' names and shapes; groups are CompVis' 32 and the scale Stable Diffusion's."""
    levels = count(sizes, r"encoder\.down\.(\d+)\.")
    widths = [size(sizes, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
    return {
        "in_channels": size(sizes, "encoder.conv_in.weight", 4)[1],
        "latent_channels": size(sizes, "post_quant_conv.weight", 4)[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": count(
            (n for n in sizes if n.startswith("encoder.down.0.")), r"encoder\.down\.0\.block\.(\d+)\."
        ),
    }


def is_compvis(name: str) -> bool:
    """Whether an array's name is one of a CompVis autoencoder, without prefix."""
    return bool(re.match(r"(encoder\.(down|mid|conv_in|conv_out|norm_out)|decoder\.(up|mid|conv_in|conv_out|norm_out)|(post_)?quant_conv)\.", name))  # fmt: skip  # noqa: E501
