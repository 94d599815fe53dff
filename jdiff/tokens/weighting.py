"""Weighted prompts, `a (red:1.3) fox`, in the grammar of AUTOMATIC1111's web UI; and prompts longer than one window.

Shapes: B prompts, S ids of a row (n chunks of `length`), E the text encoder's width.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jdiff.tokens.clip import Tokenizer

if TYPE_CHECKING:
    import jax

ROUND = 1.1
"""What a pair of round brackets without a number multiplies by; square ones divide by it."""
_MARK = re.compile(r"\\([\\()\[\]])|:\s*([+-]?[\d.]+)\s*\)|([()\[\]])")


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """A prompt's pieces and their weights; neighbours of one weight are joined.

    `(x)` multiplies the weight of x by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; brackets nest.
    A backslash takes the meaning from a bracket or backslash behind it. As in the web UI, a bracket that is never closed
    reaches to the prompt's end, and one that was never opened is text. A number that is none, `(x:1.2.3)`, is a ValueError.
    The web UI's other marks (`BREAK`, `AND`, `[from:to:when]`, `<lora:…>`) are text here.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    end = 0

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for mark in _MARK.finditer(prompt):
        escaped, number, bracket = mark.groups()
        pieces.append((prompt[end : mark.start()], 1.0))
        end = mark.end()
        if bracket in opened:
            opened[bracket].append(len(pieces))
        elif bracket == "]" and opened["["]:
            close("[", 1 / ROUND)
        elif (bracket == ")" or number) and opened["("]:
            close("(", _number(number, prompt) if number else ROUND)
        else:
            pieces.append((escaped or mark[0], 1.0))
    pieces.append((prompt[end:], 1.0))
    for bracket, factor in (("(", ROUND), ("[", 1 / ROUND)):
        while opened[bracket]:
            close(bracket, factor)

    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def weighted(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Weighted prompts to ids, int32 (B, n * max_length), and a weight for each, float32 of the same shape.

    Each piece of `parse_weights` is tokenized by itself, so a bracket also ends a word. BOS, EOS and padding weigh 1.
    Prompts of any length: see `Tokenizer.__call__` with `on_long="chunk"`; all rows get the chunks that the longest needs,
    so tokenize a prompt and its negative prompt in one call.
    """
    if isinstance(texts, str):
        raise TypeError("weighted takes a list of prompts, found one prompt")
    rows, row_weights = [], []
    for text in texts:
        pieces = [(tokenizer.encode(piece), weight) for piece, weight in parse_weights(text)]
        rows.append([i for ids, _ in pieces for i in ids])
        row_weights.append([weight for ids, weight in pieces for _ in ids])
    ids = tokenizer.frame(rows)
    weights = np.ones((len(rows), ids.shape[1] // tokenizer.max_length, tokenizer.max_length), np.float32)
    for b, row in enumerate(row_weights):
        chunk, place = np.divmod(np.arange(len(row)), tokenizer.max_length - 2)
        weights[b, chunk, 1 + place] = row
    return ids, weights.reshape(ids.shape)


def encode_chunks(encode: Callable[["jax.Array"], "jax.Array"], ids_BS: "jax.Array", length: int = 77) -> "jax.Array":
    """Rows of n chunks through a text encoder that takes one: (B, n * length) ids to (B, n * length, E).

    encode: ids (B * n, length) to states (B * n, length, E). length: the tokenizer's `max_length`. ValueError unless it
    divides the rows.
    """
    B, S = ids_BS.shape
    _chunks(S, length)
    states = encode(ids_BS.reshape(-1, length))
    return states.reshape(B, S, states.shape[-1])


def apply_weights(embeds_BSE: "jax.Array", weights_BS: "jax.Array", length: int = 77) -> "jax.Array":
    """Scales each token's state by its weight, then each chunk so that its mean is what it was, as the web UI does.

    The web UI takes the mean over all of a batch; here it is each prompt's own, so that a picture does not depend on its
    neighbours. Where the mean says nothing (below a hundredth of the root mean square, or of the other sign afterwards: a
    final LayerNorm without bias has mean 0) the chunk stays scaled. Computed in float32, returned in the embeds' dtype.
    length: the tokenizer's `max_length`.
    """
    import jax.numpy as jnp  # here, so that data workers import no JAX

    B, S, E = embeds_BSE.shape
    if weights_BS.shape != (B, S):
        raise ValueError(f"weights of {weights_BS.shape} do not fit embeds of {embeds_BSE.shape}: expected {(B, S)}")
    chunks = (B, _chunks(S, length), length)
    x = embeds_BSE.astype(jnp.promote_types(embeds_BSE.dtype, jnp.float32)).reshape(*chunks, E)
    scaled = x * weights_BS.astype(x.dtype).reshape(*chunks, 1)
    mean = lambda array: jnp.mean(array, axis=(2, 3), keepdims=True)  # noqa: E731
    before, after = mean(x), mean(scaled)
    least = 0.01 * jnp.sqrt(mean(x * x))
    usable = (jnp.abs(before) > least) & (jnp.abs(after) > least) & (before * after > 0)
    restored = scaled * jnp.where(usable, before / jnp.where(usable, after, 1), 1)
    return restored.reshape(B, S, E).astype(embeds_BSE.dtype)


def _chunks(S: int, length: int) -> int:
    """How many chunks a row has."""
    if S % length:
        raise ValueError(f"rows of {S} tokens are not chunks of {length}: length must be the tokenizer's max_length")
    return S // length


def _number(text: str, prompt: str) -> float:
    """A weight as it is written."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} in the prompt {prompt!r} is no number") from None
