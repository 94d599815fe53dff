"""Stable Diffusion's UNet: diffusers' names, and CompVis' (`input_blocks.i.j`, without `model.diffusion_model.`)."""

from typing import Any

from jdiff.convert.rows import Row, Sizes, count, refuse, size

_NUMBERED = ("down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers")


def dotted(_: Any, path: str) -> str:
    """Our path in diffusers' spelling: `down_blocks_0/attentions_1/…/to_out_0` -> `down_blocks.0.attentions.1.….to_out.0`."""
    parts = []
    for part in path.split("/"):
        head, _, number = part.rpartition("_")
        parts.append(f"{head}.{number}" if head in (*_NUMBERED, "to_out", "net") else part)
    return ".".join(parts)


DIFFUSERS = (Row(r"(.*)", dotted),)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets_0": "middle_block.0", "attentions_0": "middle_block.1", "resnets_1": "middle_block.2"}


def _inside(block: str, rest: str) -> str:
    """What is inside a residual block has names of its own; inside a transformer they are diffusers'."""
    return _RESNET[rest] if block.startswith("resnets") else dotted(None, rest)


def _down(module: Any, level: str, block: str, n: str, rest: str) -> str:
    place = 1 + int(level) * (module.layers_per_block + 1) + int(n)
    return f"input_blocks.{place}.{int(block == 'attentions')}.{_inside(block, rest)}"


def _up(module: Any, level: str, block: str, n: str, rest: str) -> str:
    place = int(level) * (module.layers_per_block + 1) + int(n)
    return f"output_blocks.{place}.{int(block == 'attentions')}.{_inside(block, rest)}"


def _upsample(module: Any, level: str) -> str:
    # it stands behind the level's last residual block and, where there is one, transformer
    attends = module.attention[len(module.attention) - 1 - int(level)]
    return f"output_blocks.{(int(level) + 1) * (module.layers_per_block + 1) - 1}.{1 + attends}.conv"


COMPVIS = (
    Row(r"conv_in", "input_blocks.0.0"),
    Row(r"time_embedding/linear_([12])", lambda _, n: f"time_embed.{2 * int(n) - 2}"),
    Row(r"down_blocks_(\d+)/(resnets|attentions)_(\d+)/(.*)", _down),
    Row(
        r"down_blocks_(\d+)/downsamplers_0/conv",
        lambda module, level: f"input_blocks.{(int(level) + 1) * (module.layers_per_block + 1)}.0.op",
    ),
    Row(r"mid_block/(\w+)/(.*)", lambda _, block, rest: f"{_MIDDLE[block]}.{_inside(block, rest)}"),
    Row(r"up_blocks_(\d+)/(resnets|attentions)_(\d+)/(.*)", _up),
    Row(r"up_blocks_(\d+)/upsamplers_0/conv", _upsample),
    Row(r"conv_norm_out", "out.0"),
    Row(r"conv_out", "out.2"),
)


def infer(sizes: Sizes, heads: int | None) -> dict[str, Any]:
    """`UNet`'s fields from CompVis' names and shapes.

    The heads cannot be seen in them: a text of width 768 tells SD 1.x, with 8 everywhere, one of 1024 SD 2.x, with heads of
    64; for others `heads` has to say how many each level has. Groups are CompVis' 32.
    """
    channels = size(sizes, "input_blocks.0.0.weight", 4)[1]
    blocks = count(sizes, r"input_blocks\.(\d+)\.")
    resampled = [i for i in range(blocks) if f"input_blocks.{i}.0.op.weight" in sizes]
    per_level = (resampled[0] if resampled else blocks) - 1
    if per_level < 1 or resampled != list(range(per_level + 1, blocks, per_level + 1)):
        raise refuse(f"the {blocks} input_blocks are resampled after {resampled}, which fits no UNet")
    starts = range(1, blocks, per_level + 1)
    widths = tuple(size(sizes, f"input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in starts)
    attends = tuple(f"input_blocks.{i}.1.norm.weight" in sizes for i in starts)
    text = size(sizes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    if heads is None and text not in (768, 1024):
        raise refuse(
            f"a UNet that reads texts of width {text} is neither SD 1.x's nor 2.x's, and its number of heads is not "
            "stored: give heads"
        )
    counts = (heads or 8,) * len(widths) if heads or text == 768 else tuple(width // 64 for width in widths)
    return {
        "in_channels": channels,
        "out_channels": size(sizes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "attention": attends,
        "heads": counts,
        "layers_per_block": per_level,
        "transformer_depth": count(sizes, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "cross_attention_dim": text,
        "linear_projection": len(sizes.get("middle_block.1.proj_in.weight", ())) == 2,
    }
