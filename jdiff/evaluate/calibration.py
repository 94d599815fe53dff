"""What a model of classes is asked while it samples: inputs at all noise levels, for static steps and for balancing.

Pictures of its own, noised again, with their labels and without, are what it is shown, so no data set is needed.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import quant, weights
from jdiff.pipelines import ClassPipeline
from jdiff.pipelines.rows import spread

BINS = 10
ALPHAS = (0.25, 0.5, 0.75, 1.0)
Batch = dict[str, jax.Array]


def noised(
    pipe: ClassPipeline, x_0_BHWC: np.ndarray, labels: Sequence[int], seed: int, draws: int
) -> Iterator[tuple[int, Batch]]:
    """(bin, {x_t, t, label}) for each of `BINS` bins of the noise level, from little noise to much, `draws` times: every row at
    a level of its own within the bin."""
    rng, rows = np.random.default_rng(seed), len(labels)
    for b in range(BINS):
        for _ in range(draws):
            level = ((b + rng.uniform(size=rows)) / BINS).astype(np.float32)
            noise = rng.normal(size=x_0_BHWC.shape).astype(np.float32)
            x_t, t = map(np.asarray, pipe.process.noised(jnp.asarray(x_0_BHWC), jnp.asarray(level), jnp.asarray(noise)))
            yield b, spread(pipe.mesh, {"x_t": x_t, "t": t, "label": np.asarray(labels, np.int32)})


def predict(model: Any, params: Any, batch: Batch) -> jax.Array:
    """The model's output for x_t's channels, float32: without a learned variance."""
    y = model.apply({"params": params}, batch["x_t"], batch["t"], batch["label"])
    return y[..., : batch["x_t"].shape[-1]].astype(jnp.float32)


def shown(pipe: ClassPipeline, labels: Sequence[int], *, seed: int = 0, draws: int = 1, **settings: Any) -> list[Batch]:
    """All that a model is shown: own pictures of these labels, noised, each batch with its labels and with none. settings: of the
    pipeline's call. ValueError when labels is empty."""
    batches = [batch for _, batch in noised(pipe, pipe(labels, seed=seed, **settings), labels, seed, draws)]
    if pipe.model.null_label is None:
        return batches
    empty = lambda batch: {**batch, "label": jnp.full_like(batch["label"], pipe.model.null_label)}  # noqa: E731
    return [one for batch in batches for one in (batch, empty(batch))]


def peaks_of(pipe: ClassPipeline, batches: Sequence[Batch]) -> dict[str, jax.Array]:
    """Of each kernel in the blocks, its inputs' largest absolute values, by channel: see `quant.observe`."""
    paths = [path for path in weights.flatten(pipe.params) if path.startswith("blocks/") and path.endswith("/kernel")]
    look = jax.jit(lambda params, batch: quant.observe(partial(predict, pipe.model, batch=batch), params, paths))
    # one at a time: XLA:CPU may hang where two programs that add up over its devices run at once
    found = [jax.block_until_ready(look(pipe.params, batch)) for batch in batches]
    return jax.tree.map(lambda *peaks: jnp.stack(peaks).max(0), *found)


def balance(
    pipe: ClassPipeline, rules: quant.Rules, batches: Sequence[Batch], peaks: dict[str, jax.Array]
) -> tuple[Any, dict[str, jax.Array], dict[str, float | None]]:
    """(parameters of the same function that round better, their peaks, alpha by kernel: SmoothQuant's, None where none helps).

    Each of the model's `dividable` kernels in turn, all blocks alike, takes the alpha of `ALPHAS` that leaves the least error in
    the quantized model's output.
    """
    run = jax.jit(partial(predict, pipe.model))
    params, exact = pipe.params, [run(pipe.params, batch) for batch in batches]

    def error(params: Any, peaks: dict[str, jax.Array]) -> float:
        rounded = quant.quantize(params, rules, peaks=peaks)
        return sum(float(jnp.square(run(rounded, batch) - y).sum()) for batch, y in zip(batches, exact, strict=True))

    least, chosen = error(params, peaks), {}
    for path in pipe.model.dividable:
        chosen[path], start = None, (params, peaks)
        for alpha in ALPHAS:
            s = quant.divisors(weights.flatten(start[0])[path], start[1][path], alpha)
            divided = pipe.model.divide_inputs(start[0], path, s), {**start[1], path: start[1][path] / s}
            if (found := error(*divided)) < least:
                least, chosen[path], (params, peaks) = found, alpha, divided
    return params, peaks, chosen
