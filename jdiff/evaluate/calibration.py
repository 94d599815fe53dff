"""What a model is asked while it samples: inputs at all noise levels, for static steps and for balancing.

Pictures, its own or a data set's, are noised, and it is shown them with their labels or captions and without.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import quant, weights
from jdiff.data import BrokenRecord, DataError, Source
from jdiff.evaluate.pictures import chosen
from jdiff.evaluate.subject import Classes, Subject, Texts
from jdiff.pipelines import ClassPipeline, TextPipeline
from jdiff.pipelines.rows import spread
from jdiff.qtensor import See

BINS = 10
ALPHAS = (0.25, 0.5, 0.75, 1.0)
Batch = dict[str, jax.Array]


def noised(subject: Subject, x_0_BhwC: np.ndarray, seed: int, draws: int) -> Iterator[tuple[int, Batch]]:
    """(bin, {x_t, t, y}) for each of `BINS` bins of the noise level, from little noise to much, `draws` times: every row at
    a level of its own within the bin."""
    rng = np.random.default_rng(seed)
    for b in range(BINS):
        for _ in range(draws):
            yield b, _noised(subject, x_0_BhwC, (b + rng.uniform(size=len(x_0_BhwC))) / BINS, rng)


def at_levels(subject: Subject, x_0_BhwC: np.ndarray, seed: int) -> Batch:
    """One such batch whose rows stand at levels from no noise to nothing else, evenly."""
    rng, rows = np.random.default_rng(seed), len(x_0_BhwC)
    return _noised(subject, x_0_BhwC, (np.arange(rows) + rng.uniform(size=rows)) / rows, rng)


def _noised(subject: Subject, x_0_BhwC: np.ndarray, level_B: np.ndarray, rng: np.random.Generator) -> Batch:
    noise = rng.normal(size=x_0_BhwC.shape).astype(np.float32)
    level = jnp.asarray(level_B.astype(np.float32))
    x_t, t = subject.process.noised(jnp.asarray(x_0_BhwC), level, jnp.asarray(noise))
    return spread(subject.mesh, {"x_t": np.asarray(x_t), "t": np.asarray(t), "y": subject.y})


def predict(model: Any, params: Any, batch: Batch) -> jax.Array:
    """The model's output for x_t's channels, float32: without a learned variance."""
    y = model.apply({"params": params}, batch["x_t"], batch["t"], batch["y"])
    return y[..., : batch["x_t"].shape[-1]].astype(jnp.float32)


output = jax.jit(predict, static_argnums=0)
"""`predict`, compiled once for a model."""


def shown(subject: Subject, x_0_BhwC: np.ndarray, *, seed: int = 0, draws: int = 1) -> list[Batch]:
    """All that a model is shown: pictures (as the model has them) noised, each batch with what they are asked for and without."""
    batches = [batch for _, batch in noised(subject, x_0_BhwC, seed, draws)]
    if subject.empty is None:
        return batches
    empty = jnp.asarray(subject.empty)
    without = lambda batch: {**batch, "y": jnp.broadcast_to(empty, batch["y"].shape).astype(batch["y"].dtype)}  # noqa: E731
    return [one for batch in batches for one in (batch, without(batch))]


def of_data(pipe: ClassPipeline | TextPipeline, source: Source, most: int) -> tuple[Subject, np.ndarray]:
    """(a pipeline asked for a source's records, the records as its model has them): so many at most, evenly spread over all.

    DataError for a source without any, or with one that cannot be read; ValueError for classes or pictures that are not the
    model's, or for a model of texts and a source without captions.
    """
    rows = _records(source, most)
    if isinstance(pipe, TextPipeline):
        if not source.has_captions:
            raise DataError(f"{source.name} has no captions, and the model is asked by texts")
        subject: Subject = Texts(pipe, [str(row["caption"]) for row in rows])
    else:
        names = pipe.class_names or [str(i) for i in range(pipe.model.num_classes)]
        theirs = source.class_names if pipe.class_names else [str(i) for i in range(source.num_classes)]
        if strange := [name for name in theirs if name not in names]:
            raise ValueError(
                f"{source.name} has the class {strange[0]!r}, which the model has not: it has {names[:10]}"
            )
        subject = Classes(pipe, [names.index(theirs[int(row["label"])]) for row in rows])
    x_0 = np.stack([row[source.kind] for row in rows])
    return subject, x_0 if source.kind == "latent" else subject.encode(x_0)


def _records(source: Source, most: int) -> list[dict[str, Any]]:
    if not len(source):
        raise DataError(f"{source.name} holds no records: there is nothing to calibrate on")
    rng = np.random.default_rng(0)
    try:
        return [source.read(int(i), False, rng) for i in chosen(len(source), most)]
    except BrokenRecord as error:
        raise DataError(f"{error.where} cannot be read: {error.reason}") from error


def peaks_of(subject: Subject, rules: quant.Rules, batches: Sequence[Batch]) -> dict[str, jax.Array]:
    """Of each kernel that the rules round, its inputs' largest absolute values, by channel: see `quant.observe`."""
    return _seen(subject, _rounded(subject, rules), batches, quant.largest, jnp.maximum)


def moments_of(subject: Subject, rules: quant.Rules, batches: Sequence[Batch]) -> dict[str, jax.Array]:
    """Of each kernel of a matrix product that the rules round, the mean of its inputs' x^T x: what GPTQ rounds by."""
    leaves = weights.flatten(subject.params)
    paths = [path for path in _rounded(subject, rules) if leaves[path].ndim < 4]
    sums = _seen(subject, paths, batches, quant.moment, jnp.add)
    return jax.tree.map(lambda total: total / len(batches), sums)


def _rounded(subject: Subject, rules: quant.Rules) -> list[str]:
    schemes = dict(rules)
    return [path for path, rule in quant.choose(subject.params, rules).items() if quant.SCHEMES[schemes[rule]]]


def _seen(
    subject: Subject, paths: Sequence[str], batches: Sequence[Batch], see: See, join: Any
) -> dict[str, jax.Array]:
    look = jax.jit(
        lambda params, batch: quant.observe(partial(predict, subject.model, batch=batch), params, paths, see)
    )
    # one at a time: XLA:CPU may hang where two programs that add up over its devices run at once
    found = (jax.block_until_ready(look(subject.params, batch)) for batch in batches)
    return reduce(partial(jax.tree.map, join), found)


def balance(
    subject: Subject, rules: quant.Rules, batches: Sequence[Batch], peaks: dict[str, jax.Array]
) -> tuple[Any, dict[str, jax.Array], dict[str, float | None]]:
    """(parameters of the same function that round better, their peaks, alpha by kernel: SmoothQuant's, None where none helps).

    Each of the model's `dividable` kernels in turn, all blocks alike, takes the alpha of `ALPHAS` that leaves the least error in
    the quantized model's output.
    """
    run = partial(output, subject.model)
    params, exact = subject.params, [run(subject.params, batch) for batch in batches]

    def error(params: Any, peaks: dict[str, jax.Array]) -> float:
        rounded = quant.quantize(params, rules, peaks=peaks)
        return sum(float(jnp.square(run(rounded, batch) - y).sum()) for batch, y in zip(batches, exact, strict=True))

    least, alphas = error(params, peaks), {}
    for path in subject.model.dividable:
        alphas[path], start = None, (params, peaks)
        for alpha in ALPHAS:
            s = quant.divisors(weights.flatten(start[0])[path], start[1][path], alpha)
            divided = subject.model.divide_inputs(start[0], path, s), {**start[1], path: start[1][path] / s}
            if (found := error(*divided)) < least:
                least, alphas[path], (params, peaks) = found, alpha, divided
    return params, peaks, alphas
