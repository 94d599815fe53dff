"""How far a quantized model is from its original: its output by noise level, the way from noise to pictures, what each kernel does.

Pictures of the original's own, noised again, are what both are asked about, so no data set is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jdiff import quant, tree, weights
from jdiff.evaluate.calibration import BINS, at_levels, noised, output
from jdiff.evaluate.reconstruction import psnr
from jdiff.evaluate.subject import Subject
from jdiff.pipelines import gather
from jdiff.qtensor import Either, QTensor


@dataclass(frozen=True)
class Distance:
    """error: relative squared error of the model's output, ||y - y_0||^2 / ||y_0||^2, in each of `BINS` bins of the noise level,
    from little noise to much. By sampler: drift, ||x - x_0|| / ||x_0|| of all pictures from the same noise, after each step;
    pictures, what comes of it, uint8 (B, H, W, 3); psnr, of these in dB, their mean. size: bytes of the parameters.
    """

    error: list[float]
    drift: dict[str, list[float]]
    psnr: dict[str, float]
    pictures: dict[str, np.ndarray]
    size: int


def compare(
    subject: Subject,
    others: Mapping[str, Subject],
    samplers: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 2,
    **settings: Any,
) -> tuple[dict[str, Distance], np.ndarray, np.ndarray]:
    """(each of `others` against `subject`, and "another seed": other noise, so that nothing but what is asked for is the same;
    what the subject makes by the first sampler, as the model has it; the same as pictures).

    samplers: the first's is what is noised again. draws: noise levels and noises a picture and bin. settings: of
    `Subject.samples`.
    """
    ways = {sampler: subject.samples(seed=seed, sampler=sampler, **settings) for sampler in samplers}
    x_0 = ways[samplers[0]][0]
    pictures = {sampler: subject.pictures(x) for sampler, (x, _) in ways.items()}
    exact = _outputs(subject, x_0, seed, draws)

    def distance(other: Subject, seed: int) -> Distance:
        made = _outputs(other, x_0, seed, draws)
        error = [float(np.square(y - y_0).sum() / np.square(y_0).sum()) for y, y_0 in zip(made, exact, strict=True)]
        drifts, ratios, sheets = {}, {}, {}
        for sampler, (_, way) in ways.items():
            x, its = other.samples(seed=seed, sampler=sampler, **settings)
            far = lambda x, x_0: float(np.linalg.norm(x - x_0) / np.linalg.norm(x_0))  # noqa: E731
            drifts[sampler] = [far(x, x_0) for x, x_0 in zip(its, way, strict=True)]
            sheets[sampler] = other.pictures(x)
            ratios[sampler] = _psnr(sheets[sampler], pictures[sampler])
        return Distance(error, drifts, ratios, sheets, quant.size(other.params))

    found = {name: distance(other, seed) for name, other in others.items()}
    return found | {"another seed": distance(subject, seed + 1)}, x_0, pictures[samplers[0]]


def _outputs(subject: Subject, x_0_BhwC: np.ndarray, seed: int, draws: int) -> list[np.ndarray]:
    """The model's output in each bin, float64 (draws * B, h, w, C)."""
    found: list[list[np.ndarray]] = [[] for _ in range(BINS)]
    for b, batch in noised(subject, x_0_BhwC, seed, draws):
        found[b].append(gather(output(subject.model, subject.params, batch))[: len(x_0_BhwC)].astype(np.float64))
    return [np.concatenate(made) for made in found]


def _psnr(made_BHWC: np.ndarray, exact_BHWC: np.ndarray) -> float:
    one, other = (jnp.asarray(x, jnp.float32) / 255.0 for x in (made_BHWC, exact_BHWC))
    return float(psnr(one, other).mean())


@dataclass(frozen=True)
class Alone:
    """What rounding one kernel does, or `name` as a whole. block: of stacked ones; None: there is but one. error: relative squared
    error of the model's output, the mean of pictures that stand at noise levels from none to all; again: the same, other noise."""

    name: str
    block: int | None
    error: float
    again: float

    def __str__(self) -> str:
        return self.name if self.block is None else f"{self.name} {self.block}"


def sensitivity(
    subject: Subject, rounded: Any, floors: Mapping[str, Subject], x_0_BhwC: np.ndarray, seed: int = 0
) -> tuple[list[Alone], list[Alone]]:
    """(each kernel rounded alone, the worst first; all of them together, and `floors`).

    rounded: the subject's parameters, quantized. x_0_BhwC: what is noised, as the model has it.
    """

    def outputs(subject: Subject, params: Any) -> list[np.ndarray]:
        made = [output(subject.model, params, at_levels(subject, x_0_BhwC, seed + i)) for i in range(2)]
        return [gather(y)[: len(x_0_BhwC)].astype(np.float64) for y in made]

    exact = outputs(subject, subject.params)

    def errors(name: str, block: int | None, made: Sequence[np.ndarray]) -> Alone:
        square = lambda y: np.square(y).sum((1, 2, 3))  # noqa: E731
        found = [float((square(y - y_0) / square(y_0)).mean()) for y, y_0 in zip(made, exact, strict=True)]
        return Alone(name, block, *found)

    floats, alone = weights.flatten(subject.params), []
    both = {
        path: Either(floats[path], leaf, jnp.zeros(leaf.shape[: len(leaf.shape) % 2], bool))
        for path, leaf in weights.flatten(rounded).items()
        if isinstance(leaf, QTensor)
    }
    places = [(path, block) for path, one in both.items() for block in (range(one.on.size) if one.on.ndim else [None])]
    for path, block in tqdm(places, desc="kernels, one by one", leave=False, delay=1):
        on = both[path].on.at[... if block is None else block].set(True)
        params = tree.nested({**floats, **both, path: replace(both[path], on=on)})
        alone.append(errors(path.removesuffix("/kernel"), block, outputs(subject, params)))
    whole = [errors("all of them", None, outputs(subject, rounded))]
    for name, other in floors.items():
        whole.append(errors(name, None, outputs(other, other.params)))
    return sorted(alone, key=lambda one: -one.error), whole


def tables(found: Mapping[str, Distance]) -> str:
    """The distances as text, a column each: by noise level, by sampler after each step (of many, ten) and in the end, and bytes."""
    width = max(12, *(len(name) + 2 for name in found))
    row = lambda title, cells: f"{title:11}" + "".join(f"{cell:>{width}}" for cell in cells)  # noqa: E731
    rows = [row("noise level", found)]
    for b in range(BINS):
        rows.append(row(f"{b / BINS:.1f} - {(b + 1) / BINS:.1f}", (f"{one.error[b]:.2e}" for one in found.values())))
    for sampler, steps in next(iter(found.values())).drift.items():
        rows += ["", row(sampler, found)]
        for step in sorted({round(i) for i in np.linspace(1, len(steps), min(10, len(steps)))}):
            cells = (f"{one.drift[sampler][step - 1]:.2e}" for one in found.values())
            rows.append(row(f"step {step}", cells))
        rows.append(row("PSNR, dB", (f"{one.psnr[sampler]:.1f}" for one in found.values())))
    rows += ["", row("weights, MB", (f"{one.size / 1e6:.2f}" for one in found.values()))]
    return "\n".join(rows)


def ranking(alone: Sequence[Alone], whole: Sequence[Alone], most: int = 20) -> str:
    """`sensitivity`'s lines as text, so many of the worst, and those of the whole."""
    shown = [*alone[:most], *whole]
    width = max(len(str(one)) for one in shown) + 2
    rows = [f"{'rounded alone':{width}}   error  other noise"]
    rows += [f"{one!s:{width}}{one.error:8.2e}     {one.again:8.2e}" for one in shown]
    if len(alone) > most:
        rows.insert(1 + most, f"and {len(alone) - most} more that err less")
    return "\n".join(rows)
