"""From words to what a text encoder reads: CLIP's tokenizer, weighted prompts, prompts longer than one window."""

from jdiff.tokens.clip import Tokenizer
from jdiff.tokens.weighting import apply_weights, encode_chunks, parse_weights, weighted

__all__ = ["Tokenizer", "apply_weights", "encode_chunks", "parse_weights", "weighted"]
