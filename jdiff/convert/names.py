"""How each family's paths are written in diffusers' and transformers' checkpoints."""

Table = tuple[tuple[str, str], ...]

_NUMBERED = (
    r"\b(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers|to_out|net|layers)_(\d+)"
)
_DIFFUSERS: Table = ((_NUMBERED, r"\1.\2"),)
FAMILIES: dict[str, Table] = {
    "UNet": _DIFFUSERS,
    "AutoencoderKL": _DIFFUSERS,
    "CLIPText": (
        (r"^(token|position)_embedding", r"embeddings/\1_embedding"),
        (r"^layers_(\d+)", r"encoder/layers/\1"),
    ),
}
"""Class -> regexes over our path without its leaf, all applied in turn; slashes become dots afterwards."""

IGNORED: dict[str, Table] = {
    "AutoencoderKL": (
        # diffusers before 0.17 called the attention's products so
        (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ),
    "CLIPText": (
        (r"^text_model\.", ""),  # transformers writes it before version 5
        (r"^embeddings\.position_ids$", ""),  # a buffer: 0, 1, 2, …
        (r"^text_projection\.weight$", ""),  # of CLIP's contrastive loss
    ),
}
"""Class -> what older versions of the library wrote, as the newer name; an array renamed to nothing holds no weight."""
