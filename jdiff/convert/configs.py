"""Modules as the `config.json` of diffusers and transformers, and DiT's read back; the others' reader is `models.from_config`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jdiff import models
from jdiff.convert.rows import refuse

_DIT_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_DIT_READ = (
    *(
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "num_layers",
        "sample_size",
        "patch_size",
    ),
    *("num_embeds_ada_norm", "norm_num_groups", "upcast_attention", "norm_eps"),
)


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Any:
    """The module that a `config.json` describes; ValueError names a key that jdiff has nothing for."""
    if config.get("_class_name") in ("DiTTransformer2DModel", "Transformer2DModel"):
        return models.build({"class": "DiT", **_dit(config)}, dtype)
    return models.from_config(config, dtype)


def _dit(config: Mapping[str, Any]) -> dict[str, Any]:
    what = config["_class_name"]
    for key, value in config.items():
        if key in _DIT_FIXED and value != _DIT_FIXED[key]:
            raise refuse(f"{what}: {key}={value!r} is not supported, only {_DIT_FIXED[key]!r}")
        known = key in _DIT_FIXED or key in _DIT_READ or key.startswith("_")
        if not known and value not in (None, False):
            raise refuse(f"{what}: {key}={value!r} is not supported by jdiff")
    # 1e-6 is what DiT was trained with; the published folder says 1e-5, and the outputs differ by less than 1e-4
    if config.get("norm_eps", 1e-5) not in (1e-5, 1e-6):
        raise refuse(f"{what}: norm_eps={config['norm_eps']!r} is not supported, only 1e-06")
    channels, heads = config.get("in_channels", 4), config.get("num_attention_heads", 16)
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise refuse(f"{what}: out_channels={out} must be in_channels={channels}, or twice that")
    return {
        "image_size": config.get("sample_size", 32),
        "channels": channels,
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "patch_size": config.get("patch_size", 2),
        "width": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "heads": heads,
        "learn_sigma": out == 2 * channels,
        "freq_shift": 1,  # diffusers' own; see DiT
    }


def to_config(module: Any, dtype: str = "float32") -> dict[str, Any]:
    """A module's `config.json`, as its library writes it. dtype: of the weights (transformers stores it).

    ConversionError for a setting that the library does not have.
    """
    writers = {
        "DiT": _write_dit,
        "UNet": _write_unet,
        "AutoencoderKL": _write_vae,
        "CLIPText": _write_text,
        "CLIP": _write_clip,
    }
    return writers[type(module).__name__](module, dtype)


def _write_dit(module: Any, _: str) -> dict[str, Any]:
    for field, only in (("mlp_ratio", 4.0), ("qk_norm", False)):
        if getattr(module, field) != only:
            raise refuse(f"diffusers' DiT has no {field}={getattr(module, field)!r}, only {only!r}: use another format")
    if not module.label_dropout:
        raise refuse("diffusers' DiT has an unconditional label, and this one has none: use another format")
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": module.image_size,
        "in_channels": module.channels,
        "out_channels": module.channels * (1 + module.learn_sigma),
        "num_embeds_ada_norm": module.num_classes,
        "patch_size": module.patch_size,
        "num_attention_heads": module.heads,
        "attention_head_dim": module.width // module.heads,
        "num_layers": module.depth,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "upcast_attention": False,
        **_DIT_FIXED,
    }


def _write_unet(module: Any, _: str) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in module.attention]
    heads = list(module.heads)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "block_out_channels": list(module.block_out_channels),
        "layers_per_block": module.layers_per_block,
        "transformer_layers_per_block": module.transformer_depth,
        "cross_attention_dim": module.cross_attention_dim,
        # the number of heads: diffusers' documented misnomer
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "norm_num_groups": module.norm_num_groups,
        "norm_eps": 1e-5,
        "use_linear_projection": module.linear_projection,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    }


def _write_vae(module: Any, _: str) -> dict[str, Any]:
    levels = len(module.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": module.in_channels,
        "out_channels": module.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(module.block_out_channels),
        "layers_per_block": module.layers_per_block,
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.norm_num_groups,
        "scaling_factor": module.scaling_factor,
        "act_fn": "silu",
        "sample_size": 512,
    }


def _write_text(module: Any, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocab_size,
        "hidden_size": module.width,
        "intermediate_size": module.hidden,
        "num_hidden_layers": module.layers,
        "num_attention_heads": module.heads,
        "max_position_embeddings": module.max_length,
        "hidden_act": module.activation,
        "layer_norm_eps": module.eps,
        "projection_dim": module.width,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "bos_token_id": module.vocab_size - 2,
        "eos_token_id": module.vocab_size - 1,
        "pad_token_id": 1,
        "torch_dtype": dtype,
    }


def _write_clip(module: Any, dtype: str) -> dict[str, Any]:
    text = {**_write_text(module, dtype), "eos_token_id": module.eos_id, "projection_dim": module.projection}
    vision = {
        "model_type": "clip_vision_model",
        "image_size": module.image_size,
        "patch_size": module.patch_size,
        "num_channels": 3,
        "hidden_size": module.vision_width,
        "intermediate_size": module.vision_hidden,
        "num_hidden_layers": module.vision_layers,
        "num_attention_heads": module.vision_heads,
        "hidden_act": module.vision_activation,
        "layer_norm_eps": module.vision_eps,
        "projection_dim": module.projection,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": module.projection,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": dtype,
    }
