"""From a path to something that runs: `load` gives (model, params), `pipeline` a sampler around them."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdiff import checkpoint, models, sharding, tree
from jdiff import config as configs
from jdiff.diffusion.process import make_process
from jdiff.pipelines import ClassPipeline


def load(
    path: str | Path, *, weights: Literal["ema", "raw"] = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """(model, params) of a training run's newest whole checkpoint, or of `step`.

    weights: the moving average, or the parameters that were being trained. mesh: where the arrays go (replicated over the
    default mesh when None). Raises CheckpointError, in one line, when nothing there can be used.
    """
    model, params, _ = load_run(Path(path), weights=weights, step=step, mesh=mesh)
    return model, params


def load_run(
    workdir: Path, *, weights: str = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """`load`, with the checkpoint's metadata as the third value."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; use 'ema' or 'raw'")
    if not workdir.exists():
        raise checkpoint.CheckpointError(f"{workdir} does not exist")
    there = checkpoint.steps(workdir)
    if not there:
        raise checkpoint.CheckpointError(
            f"{workdir} holds no checkpoint; a training run's folder has them in checkpoints/STEP"
        )
    if step is not None and step not in there:
        raise checkpoint.CheckpointError(f"{workdir} has no checkpoint of step {step}; it has {there}")
    mesh = mesh or sharding.make_mesh()

    def read(step: int) -> tuple[Any, Any, dict[str, Any]]:
        meta = checkpoint.read_meta(workdir, step)
        model = model_of(meta)
        full = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
        where = sharding.replicated(mesh)
        full = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), full)
        chosen, frozen = tree.set_apart(full, model.frozen)
        item = "ema_params" if weights == "ema" else "params"
        items = checkpoint.restore(workdir, step, {item: chosen, "frozen": frozen}, meta)
        return model, tree.merge(items[item], items["frozen"]), meta

    return read(step) if step is not None else checkpoint.newest_whole(there, read)


def model_of(meta: dict[str, Any]) -> Any:
    """The model that a checkpoint's metadata describes."""
    settings, fixed = meta["config"]["model"], meta["model"]
    overrides = {k: v for k, v in settings.items() if k != "name" and v is not None}
    overrides |= {k: v for k, v in fixed.items() if k != "name"}
    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[meta["config"]["precision"]]
    return models.create(fixed["name"], dtype=dtype, **overrides)


def pipeline(path: str | Path, *, weights: Literal["ema", "raw"] = "ema", step: int | None = None) -> ClassPipeline:
    """A sampler for the run at `path`, over all local devices; settings of the diffusion come from the run itself."""
    mesh = sharding.make_mesh()
    model, params, meta = load_run(Path(path), weights=weights, step=step, mesh=mesh)
    process = make_process(configs.from_dict(meta["config"]).diffusion, model.learn_sigma)
    preview = None
    if meta["config"]["data"]["name"] == "latents":
        from jdiff.data.latents import Latents

        preview = Latents(meta["config"]["data"]["path"]).preview
    return ClassPipeline(model, params, process, mesh=mesh, class_names=meta["class_names"], preview=preview)
