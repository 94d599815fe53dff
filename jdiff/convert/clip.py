"""CLIP: transformers' names. The text encoder's alone had `text_model.` in front before version 5; CLIP's whole has it still."""

from typing import Any

from jdiff.convert.rows import Row, Sizes, count, size

TRANSFORMERS = (
    Row(r"(token|position)_embedding", r"embeddings.\1_embedding"),
    Row(r"layers_(\d+)/(.*)", lambda _, n, rest: f"encoder.layers.{n}.{rest.replace('/', '.')}"),
    Row(r"final_layer_norm", "final_layer_norm"),
)
PREFIX = "text_model."
WHOLE = (
    Row(
        r"(text|vision)_model/layers_(\d+)/(.*)",
        lambda _, part, n, rest: f"{part}_model.encoder.layers.{n}.{rest.replace('/', '.')}",
    ),
    Row(r"(text|vision)_model/(\w+_embedding)", r"\1_model.embeddings.\2"),
    Row(r"vision_model", "vision_model.embeddings"),  # its class_embedding
    Row(r"(text|vision)_model/(\w+)", r"\1_model.\2"),
    Row(r"(\w+_projection|logit_scale)", r"\1"),
)
IGNORED = (
    (r"(text_model\.)?embeddings\.position_ids", "a buffer: 0, 1, 2, …"),
    (r"text_projection\.weight", "of CLIP's contrastive loss"),
    (r"logit_scale", "of CLIP's contrastive loss"),
)
WHOLE_IGNORED = ((r"(text|vision)_model\.embeddings\.position_ids", "a buffer: 0, 1, 2, …"),)


def infer(sizes: Sizes, heads: int | None) -> dict[str, Any]:
    """`CLIPText`'s fields from transformers' names (without prefix) and shapes; heads are of 64, as in every CLIP, unless given."""
    vocabulary, width = size(sizes, "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "width": width,
        "hidden": size(sizes, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        "layers": count(sizes, r"encoder\.layers\.(\d+)\."),
        "heads": heads or max(width // 64, 1),
        "max_length": size(sizes, "embeddings.position_embedding.weight", 2)[0],
    }
