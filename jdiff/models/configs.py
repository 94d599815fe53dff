"""`config.json` of diffusers and transformers, read as our modules' fields.

Every key is of one of three kinds: read; fixed, where another value than the one listed means an architecture that jdiff does
not have; or idle, which changes no number of the forward pass. Any other key is refused, unless its value says "nothing".
"""

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]
IDLE = ("sample_size", "upcast_attention", "force_upcast", "dropout", "attention_type", "addition_embed_type_num_heads")
NOTHING = (None, False, "default")
UNET_FIXED: Config = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
}
VAE_FIXED: Config = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
TEXT_IDLE = (
    *("attention_dropout", "initializer_range", "initializer_factor", "projection_dim", "dropout", "architectures"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "model_type", "torch_dtype", "dtype", "transformers_version"),
    *("output_hidden_states", "return_dict", "output_attentions", "chunk_size_feed_forward", "id2label", "label2id"),
    *("problem_type", "is_encoder_decoder", "use_cache", "tie_word_embeddings", "finetuning_task"),
    # of generation, which transformers once wrote into every config
    *("length_penalty", "max_length", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "pruned_heads"),
)


def read(config: Config) -> tuple[str, dict[str, Any]]:
    """(class, fields) of the module that a config describes; ValueError names what jdiff does not have."""
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), config.get("model_type"))
    readers: dict[Any, Callable[[Config], tuple[str, dict[str, Any]]]] = {
        "UNet2DConditionModel": _unet,
        "AutoencoderKL": _vae,
        "CLIPTextModel": _text,
        "CLIPTextModelWithProjection": _text,
        "clip_text_model": _text,
        "CLIPModel": _clip,
        "clip": _clip,
    }
    if name not in readers:
        raise ValueError(f"a config.json of {name!r} is not one that jdiff has; it has {list(readers)}")
    return readers[name](config)


def _check(what: str, config: Config, used: tuple[str, ...], fixed: Config, idle: tuple[str, ...]) -> None:
    for key, value in config.items():
        value = list(value) if isinstance(value, tuple) else value
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{what}: {key}={value!r} is not supported, only {fixed[key]!r}")
        known = key in used or key in fixed or key in idle or key.startswith("_")
        if not known and value not in NOTHING:
            raise ValueError(f"{what}: {key}={value!r} is not supported by jdiff")


def _each(what: str, key: str, value: Any, levels: int) -> tuple[int, ...]:
    """One number for all levels, or one for each."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    if len(values) != levels:
        raise ValueError(f"{what}: {key}={value!r} must be one number or {levels}")
    return values


def _same(what: str, key: str, value: Any) -> int:
    """A number that must be the same for every level."""
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1:
        raise ValueError(f"{what}: {key}={value!r} is not supported, only one number for all levels")
    return values.pop()


def _unet(config: Config) -> tuple[str, dict[str, Any]]:
    what = "UNet2DConditionModel"
    used = (
        *(
            "in_channels",
            "out_channels",
            "down_block_types",
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
        ),
        *("norm_num_groups", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"),
        *("num_attention_heads", "use_linear_projection"),
    )
    _check(what, config, used, UNET_FIXED, IDLE)
    widths = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    attends = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    down = tuple(config.get("down_block_types", attends))
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if len(down) != len(widths) or not set(down) <= set(kinds):
        raise ValueError(f"{what}: down_block_types={list(down)} must be {len(widths)} of {list(kinds)}")
    mirrored = tuple("CrossAttnUpBlock2D" if kinds[kind] else "UpBlock2D" for kind in reversed(down))
    if tuple(config.get("up_block_types", mirrored)) != mirrored:
        raise ValueError(
            f"{what}: up_block_types={list(config['up_block_types'])} is not supported, only {list(mirrored)}"
        )
    # diffusers' `attention_head_dim` is the number of heads, unless `num_attention_heads` is given: its documented misnomer
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    return "UNet", {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "block_out_channels": widths,
        "attention": tuple(kinds[kind] for kind in down),
        "heads": _each(what, "attention_head_dim", heads, len(widths)),
        "layers_per_block": _same(what, "layers_per_block", config.get("layers_per_block", 2)),
        "transformer_depth": _same(what, "transformer_layers_per_block", config.get("transformer_layers_per_block", 1)),
        "cross_attention_dim": _same(what, "cross_attention_dim", config.get("cross_attention_dim", 1280)),
        "norm_num_groups": config.get("norm_num_groups", 32),
        "linear_projection": config.get("use_linear_projection", False),
    }


def _vae(config: Config) -> tuple[str, dict[str, Any]]:
    what = "AutoencoderKL"
    used = (
        *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"),
        *("layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor"),
    )
    _check(what, config, used, VAE_FIXED, IDLE)
    widths = tuple(config.get("block_out_channels", (64,)))
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        found = tuple(config.get(key, (kind,)))
        if found != (kind,) * len(widths):
            raise ValueError(
                f"{what}: {key}={list(found)} is not supported, only {kind} for each of {len(widths)} levels"
            )
    channels = config.get("in_channels", 3)
    if config.get("out_channels", 3) != channels:
        raise ValueError(f"{what}: out_channels={config.get('out_channels', 3)} must equal in_channels={channels}")
    return "AutoencoderKL", {
        "in_channels": channels,
        "latent_channels": config.get("latent_channels", 4),
        "block_out_channels": widths,
        "layers_per_block": config.get("layers_per_block", 1),
        "norm_num_groups": config.get("norm_num_groups", 32),
        "scaling_factor": config.get("scaling_factor", 0.18215),
    }


def _text(config: Config) -> tuple[str, dict[str, Any]]:
    what = "CLIPTextModel"
    names = {
        "vocab_size": ("vocab_size", 49408),
        "hidden_size": ("width", 512),
        "intermediate_size": ("hidden", 2048),
        "num_hidden_layers": ("layers", 12),
        "num_attention_heads": ("heads", 8),
        "max_position_embeddings": ("max_length", 77),
        "hidden_act": ("activation", "quick_gelu"),
        "layer_norm_eps": ("eps", 1e-5),
    }
    _check(what, config, tuple(names), {}, TEXT_IDLE)
    return "CLIPText", {ours: config.get(theirs, default) for theirs, (ours, default) in names.items()}


def _clip(config: Config) -> tuple[str, dict[str, Any]]:
    what = "CLIPModel"
    used = ("text_config", "vision_config", "text_config_dict", "vision_config_dict", "projection_dim")
    _check(what, config, used, {}, (*TEXT_IDLE, "logit_scale_init_value"))
    # where a value stands in both, transformers takes the second's
    parts = [
        {**(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})}
        for part in ("text", "vision")
    ]
    text, vision = parts
    names = {
        "image_size": ("image_size", 224),
        "patch_size": ("patch_size", 32),
        "hidden_size": ("vision_width", 768),
        "intermediate_size": ("vision_hidden", 3072),
        "num_hidden_layers": ("vision_layers", 12),
        "num_attention_heads": ("vision_heads", 12),
        "hidden_act": ("vision_activation", "quick_gelu"),
        "layer_norm_eps": ("vision_eps", 1e-5),
    }
    _check("CLIPVisionModel", vision, tuple(names), {"num_channels": 3}, TEXT_IDLE)
    fields = {ours: vision.get(theirs, default) for theirs, (ours, default) in names.items()}
    fields |= {**_text(text)[1], "projection": config.get("projection_dim", 512)}
    # 2 stands in configs of before 2023, whose texts are read at the largest id
    eos = text.get("eos_token_id", 49407)
    return "CLIP", {**fields, "eos_id": fields["vocab_size"] - 1 if eos == 2 else eos}
