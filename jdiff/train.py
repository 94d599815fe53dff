"""Training: the state, one step as a free function, and the loop around it. What is trained is a task's: see `tasks`.

The loop gives the device its next step before it reads the last one's metrics. What a step does depends on
(config, step) alone: the batch's order and crops, the noise, the dropped labels, all are derived from the seed and the
step's number, so a run that was stopped anywhere goes on as if it had not been.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jdiff import checkpoint, data, optim, sharding, target, tree
from jdiff import config as configs
from jdiff.evaluate.training import Scoring
from jdiff.interrupt import Left, Signals, Stopped
from jdiff.logbook import Logbook, read_metrics
from jdiff.meter import Meter, Window
from jdiff.optim import Ema
from jdiff.pipelines import save_png
from jdiff.processes import Peers
from jdiff.report import write_report
from jdiff.tasks import NOTHING, GradientFn, Task, make_task

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What training carries from step to step.

    params: the trainable leaves; frozen: the others; base: those of the others that a checkpoint leaves where they came from.
    Merged they are the model's tree. ema_params: the average of params.
    """

    step: jax.Array
    params: Any
    frozen: Any
    base: Any
    opt_state: Any
    ema_params: Any

    def items(self) -> dict[str, Any]:
        """The state as a checkpoint keeps it, without the base and its models: by item, since sampling reads only some."""
        held = [name for name in self.params if jax.tree.leaves((self.params[name], self.frozen[name]))]
        trees = {"params": self.params, "frozen": self.frozen, "ema_params": self.ema_params}
        progress = {"step": self.step, "opt_state": self.opt_state}
        return {**{item: {name: whole[name] for name in held} for item, whole in trees.items()}, "progress": progress}

    @classmethod
    def from_items(cls, items: Mapping[str, Any], base: Any) -> "TrainState":
        """Undoes `items`."""
        empty, _ = tree.set_apart(base, r".*")
        params, frozen, average = ({**empty, **items[name]} for name in ("params", "frozen", "ema_params"))
        return cls(items["progress"]["step"], params, frozen, base, items["progress"]["opt_state"], average)


def init_state(task: Task, tx: optax.GradientTransformation, key: jax.Array, given: Any) -> TrainState:
    """A fresh state: the task's initialisation, its frozen leaves apart, the average starting as a copy."""
    return make_state(task.init(key, given), tx, task.frozen, task.base)


def make_state(full: Any, tx: optax.GradientTransformation, frozen: str, base: str = NOTHING) -> TrainState:
    """The state at step 0 of a full tree. frozen, base: regexes as `Task` has them."""
    params, rest = tree.set_apart(full, frozen)
    frozen, base = tree.set_apart(rest, base)
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, base, tx.init(params), jax.tree.map(jnp.copy, params))


def sample_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """A key for each row of a global batch, from (seed, step, row) alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    gradient: GradientFn,
    tx: optax.GradientTransformation,
    ema: Ema,
    seed: int,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from a batch of global arrays (B, ...), in `accumulate` micro-batches.

    When the loss or the gradient is not finite the step is refused: only the step's number moves on. Metrics: the mean of
    each loss, `grad_norm`, `refused` (0 or 1), and, where a noise level comes with the losses, sums and counts of the loss
    by quarter of it.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    keys_B = sample_keys(seed, state.step, rows)
    frozen = tree.merge(state.frozen, state.base)

    if accumulate == 1:
        grads, losses = gradient(state.params, frozen, batch, keys_B, state.step)
        loss = losses["loss"].mean()
    else:
        # rows are dealt round, so that each device's rows of a micro-batch are rows it already holds
        deal = lambda x: jnp.moveaxis(x.reshape(rows // accumulate, accumulate, *x.shape[1:]), 1, 0)  # noqa: E731

        def body(total_grads: Any, micro: Any) -> tuple[Any, Any]:
            part, keys = micro
            grads, losses = gradient(state.params, frozen, part, keys, state.step)
            return jax.tree.map(jnp.add, total_grads, grads), (losses["loss"].mean(), losses)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (loss_A, losses) = jax.lax.scan(body, zeros, jax.tree.map(deal, (dict(batch), keys_B)))
        grads, loss = jax.tree.map(lambda g: g / accumulate, grads), loss_A.mean()
        losses = jax.tree.map(lambda x: x.reshape(-1), losses)

    norm = optax.tree.norm(grads)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    scale = optim.clip_scale(norm, clip_norm)
    grads = jax.tree.map(lambda g: g * scale, grads) if clip_norm is not None else grads
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = ema.update(state.ema_params, params, state.step)
    # element by element, so that it fuses with the update and costs no pass of its own
    keep = partial(jax.tree.map, lambda new, old: jnp.where(fine, new, old))
    new = TrainState(
        state.step + 1,
        keep(params, state.params),
        state.frozen,
        state.base,
        keep(opt_state, state.opt_state),
        keep(ema_params, state.ema_params),
    )
    metrics = {name: values_B.mean() for name, values_B in losses.items() if name != "time"}
    metrics |= {"loss": loss, "grad_norm": norm, "refused": 1.0 - fine}
    if "time" in losses:
        quarter_B4 = jnp.clip(losses["time"] * 4, 0, 3).astype(jnp.int32)[:, None] == jnp.arange(4)
        quarter_B4 = quarter_B4.astype(jnp.float32)
        metrics |= {"quarter_sums": losses["loss"] @ quarter_B4, "quarter_counts": quarter_B4.sum(0)}
    return new, metrics


StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def jitted_step(mesh: Mesh, placed: TrainState, gradient: GradientFn, **settings: Any) -> StepFn:
    """`train_step` for a state that lies on the mesh as `placed` says, shardings in the state's form; the state that goes in is
    donated. settings: the step's own."""

    def lay(grad: jax.Array, where: NamedSharding) -> jax.Array:
        """As a parameter that is split, not yet as its moments: XLA:TPU would sum everywhere what it else scatters over fsdp."""
        return grad if where.is_fully_replicated else jax.lax.with_sharding_constraint(grad, where)

    def laid(*args: Any) -> Any:
        grads, losses = gradient(*args)
        return jax.tree.map(lay, grads, placed.params), losses

    return jax.jit(
        sharding.in_use(mesh, partial(train_step, gradient=laid, **settings)),
        in_shardings=(placed, sharding.batch_sharding(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=target.compiler_options(),
    )


class Setup:
    """What a config makes on this machine, or on `devices` that it is compiled for, all of it checked, nothing of it compiled yet.

    Raises ValueError for a config or data set that cannot work.
    """

    def __init__(
        self,
        config: configs.Config,
        workdir: Path | None = None,
        devices: list[Any] | None = None,
        peers: Peers | None = None,
    ):
        self.config, self.peers = config, peers or Peers()
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        configs.check(config, sharding.row_devices(self.mesh))
        self.task = make_task(config, self.mesh, workdir)
        self.source = self.task.source
        self.scoring = Scoring(config, self.source, self.mesh, workdir) if config.get("eval_every") else None
        o = config.optim
        self.lr = optim.make_schedule(o.schedule, o.lr, o.warmup_steps, config.total_steps)
        settings = {"plus_ratio": config.lora.plus_ratio}
        self.tx = optim.make_optimizer(self.lr, o.weight_decay, o.b1, o.b2, o.eps, **settings)
        self.init = partial(init_state, self.task, self.tx)
        self.shapes = jax.eval_shape(self.init, jax.random.key(0), {})
        self.placed = sharding.shardings(self.mesh, self.shapes)

    @property
    def abstract(self) -> TrainState:
        """The state as shapes with shardings."""
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(place, self.shapes, self.placed)

    @property
    def target(self) -> dict[str, Any]:
        """The state's items as shapes with shardings, for a restore."""
        return self.abstract.items()

    def fresh_state(self) -> TrainState:
        """A state initialised from the seed and what the task is given, straight onto the mesh."""
        given = self.task.given()
        given = sharding.put_all(given, sharding.shardings(self.mesh, given))
        init, key = jax.jit(self.init, out_shardings=self.placed), jax.random.key(self.config.seed)
        self.peers.compile(init, key, given)
        return init(key, given)

    def base(self) -> Any:
        """The state's leaves that no checkpoint holds, from where they came from."""
        return self.fresh_state().base if jax.tree.leaves(self.shapes.base) else self.shapes.base

    @cached_property
    def step(self) -> StepFn:
        """`jitted_step` of this config."""
        return jitted_step(
            self.mesh,
            self.placed,
            self.task.gradient,
            tx=self.tx,
            ema=Ema(self.config.ema.decay, self.config.ema.warmup),
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            clip_norm=self.config.optim.clip_norm,
        )

    @cached_property
    def gather(self) -> Callable[[Any], Any]:
        """Lays an average as the parameters. One program: XLA:CPU's gathers of many at once can wait for one another for ever."""
        if self.placed.ema_params == self.placed.params:
            return lambda average: average
        return jax.jit(lambda average: average, out_shardings=self.placed.params)

    def batches(self, start_step: int, workdir: Path) -> Any:
        """This process's rows of every global batch from `start_step` on."""
        return data.batches(
            self.source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            flip=self.config.data.flip,
            workers=self.config.data.workers,
            rows=sharding.process_rows(self.mesh, self.config.batch_size),
            bad_log=workdir / "bad_images.jsonl",
            max_bad_rate=self.config.data.max_bad_rate,
            transform=self.task.transform,
        )

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """What a checkpoint records of the run, beside its arrays. measures: the task's, of the parameters at hand."""
        return {"config": self.config.to_dict(), "measures": dict(measures), **self.task.facts(measures)}

    def tell_unsplit(self) -> None:
        """Says which large arrays each device holds whole, although mesh.fsdp is above 1."""
        full = {name: getattr(self.shapes, name) for name in ("params", "frozen", "base")}
        if whole := sharding.unsplit(self.mesh, full):
            shown = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
            log.info(
                "mesh.fsdp=%d divides no side of %d large array(s), which every device holds whole: %s",
                self.mesh.shape["fsdp"],
                len(whole),
                shown,
            )

    def describe(self) -> str:
        """One line: model, size, precision, devices, data."""
        shape, size = dict(self.mesh.shape), tree.count((self.shapes.params, self.shapes.frozen, self.shapes.base))
        trained = tree.count(self.shapes.params)
        return (
            f"{self.task.title}: {size:,} parameters, {trained:,} trained, {self.config.precision}, "
            f"{self.mesh.size} device(s) as {shape}, "
            f"{len(self.source):,} records of {self.source.num_classes} classes from {self.source.name}"
        )


def compare_runs(setup: Setup, meta: Mapping[str, Any], workdir: Path) -> None:
    """Raises where the workdir's checkpoint is of another model; says what else differs from it."""
    now, then = json.loads(json.dumps(setup.facts({}))), meta
    same = ("remat", "scan_layers", "scaling_factor")  # how a model is run, or measured, not what it is
    known = (configs.flat(facts["models"]) for facts in (now, then))
    new, old = ({k: v for k, v in facts.items() if k.rsplit(".")[-1] not in same} for facts in known)
    if new != old:
        wrong = [f"{key} {old.get(key)} -> {new.get(key)}" for key in {**new, **old} if old.get(key) != new.get(key)]
        raise checkpoint.CheckpointError(
            f"{workdir} holds checkpoints of another model ({', '.join(wrong)}); "
            "choose another --workdir, or the config it was made with"
        )
    if (base := now.get("lora", {}).get("base")) != then.get("lora", {}).get("base"):
        what = f"init_from={setup.config.init_from} is another base than the adapters in {workdir} were trained on"
        if base is None or not setup.config.lora.any_base:
            raise checkpoint.CheckpointError(f"{what}: give that base, or --config.lora.any_base=true to take this one")
        log.warning("%s", what)
    old = configs.flat(then["config"])
    for key, value in configs.flat(now["config"]).items():
        if old.get(key) != value:
            log.warning("config differs from the checkpoint's: %s was %s, is %s", key, old.get(key), value)
    if now["data_fingerprint"] != then["data_fingerprint"]:
        log.warning("the data differs from the checkpoint's (another listing): its order is not continued")


def resume(setup: Setup, checkpoints: checkpoint.Checkpoints) -> tuple[TrainState, Window]:
    """The workdir's newest whole state, or a fresh one: see the resume ladder in `checkpoint`."""

    def target(meta: dict[str, Any]) -> dict[str, Any]:
        compare_runs(setup, meta, checkpoints.workdir)
        return setup.target

    found = checkpoints.restore_newest(target)
    if found is None:
        return setup.fresh_state(), Window()
    items, meta = found
    log.info("resumed from step %d of %s", meta["step"], checkpoints.workdir)
    return TrainState.from_items(items, setup.base()), Window(meta["window"])


class Run:
    """A run under way: the state, and what is done with it after a step."""

    def __init__(self, setup: Setup, workdir: Path, state: TrainState, window: Window, book: Logbook, checkpoints: Any):
        self.setup, self.workdir, self.state, self.window = setup, workdir, state, window
        self.book, self.checkpoints = book, checkpoints
        self.config, self.task = setup.config, setup.task
        self.meter = Meter(setup.task.macs(), self.config.batch_size, list(setup.mesh.devices.flat))
        self.refused = 0
        self.last_grid: Path | None = None

    def read(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        index: jax.Array,
        waited: float,
        measures: Mapping[str, float],
    ) -> None:
        """A finished step's metrics: into the window, the bar and, at its cadence or with `measures`, the record."""
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        self.book.bar.update()
        if values.pop("refused"):
            self.refused += 1
            records = np.concatenate(
                [np.asarray(shard.data).reshape(-1) for shard in index.addressable_shards]
            ).tolist()
            log.warning("step %d refused: its loss or gradient is not finite; records %s", step, records)
            if self.refused >= self.config.max_refused:
                raise FloatingPointError(
                    f"{self.refused} steps in a row had a non-finite loss or gradient, the last at step {step}: "
                    "lower optim.lr, set optim.clip_norm, or look at the records named above"
                )
        else:
            self.refused = 0
            self.window.add(values)
        if step % self.config.log_every == 0 or step == self.config.total_steps or measures:
            record = {**self.window.means(), **measures, "lr": float(np.asarray(self.setup.lr(step - 1)))}
            self.book.write(step, record, self.meter.read(waited))

    def average(self) -> Any:
        """The full tree with the averaged parameters, where the parameters themselves lie: sampling reads them at every step."""
        return tree.merge(self.setup.gather(self.state.ema_params), self.state.frozen, self.state.base)

    def save(self, step: int, measures: Mapping[str, float]) -> None:
        """Starts a checkpoint."""
        facts = {**self.setup.facts(measures), "window": self.window.values}
        self.checkpoints.save(step, self.state.items(), facts)

    def score(self, step: int, signals: Signals) -> bool:
        """Scores of the average, as a record of their own; False when a signal came and they are left to the next start."""
        assert self.setup.scoring is not None
        samples = self.task.samples(self.average())
        made = samples.made
        assert made is not None
        if jax.process_count() == 1:  # several would have to leave it at the same batch
            samples = dataclasses.replace(samples, made=lambda first: signals.until_caught(made(first)))
        try:
            self.book.write(step, self.setup.scoring(samples, step), {})
        except Left:
            return False
        return True

    def catch_up(self, step: int, signals: Signals) -> None:
        """What the step that the run goes on from was to leave, where the run ended between its save and that: scores, pictures.

        `Stopped` when a signal comes before the scores are made.
        """
        config, told = self.config, read_metrics(self.workdir / "metrics.jsonl")
        last = step == config.total_steps
        if self.setup.scoring and (last or step % config.eval_every == 0):
            records = [record for record in told if record["step"] == step]
            made = any(config.eval.metrics[0] in record for record in records) or self.score(step, signals)
            if not made and signals.caught is not None:
                raise Stopped(signals.caught, step)
        if (last or step % config.sample_every == 0) and not self.grid_path(step).exists():
            self.sample(step, self.task.measure(self.average()))

    def grid_path(self, step: int) -> Path:
        """Where a step's pictures go."""
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def sample(self, step: int, measures: Mapping[str, float]) -> None:
        """The task's pictures from the average."""
        image, facts = self.task.grid(self.average())
        self.last_grid = self.grid_path(step)
        if jax.process_index() == 0:
            save_png(image, self.last_grid, {"step": step, "seed": self.config.seed, **facts, **measures})
            self.book.picture(step, "samples", image)
            write_report(self.workdir, configs.flat(self.config.to_dict()))


def fit(config: configs.Config, workdir: Path, peers: Peers | None = None) -> Path:
    """Trains to config.total_steps in `workdir`, resuming from what is there; returns the last sample grid's path.

    peers: of several processes, each of which calls this with the same config and a workdir that all of them see.
    Raises ValueError for a config, data set or workdir that cannot work, `Stopped` when a signal ended the run after a
    save, FloatingPointError after config.max_refused refused steps in a row.
    """
    peers = peers or Peers()
    setup = Setup(config, workdir, peers=peers)
    listing = {"data": setup.source.fingerprint, "records": len(setup.source)}
    peers.agree({**listing, "checkpoints in the workdir": checkpoint.steps(workdir)})
    with Signals() as signals, checkpoint.Checkpoints(workdir, config.keep) as checkpoints:
        state, window = resume(setup, checkpoints)
        start = int(state.step)
        log.info("%s", setup.describe())
        setup.tell_unsplit()
        log.info("workdir %s, steps %d to %d", workdir, start, config.total_steps)
        book = Logbook(workdir, start, configs.flat(config.to_dict()), active=jax.process_index() == 0)
        with book, data.to_device(setup.batches(start, workdir), partial(sharding.put_batch, setup.mesh)) as batches:
            run = Run(setup, workdir, state, window, book, checkpoints)
            del state
            if setup.scoring:
                with run.meter.paused():
                    _ = setup.scoring.reference  # now, so that a picture that cannot be read ends no long run
            if start:
                with run.meter.paused():
                    run.catch_up(start, signals)
            pending: tuple[int, Mapping[str, jax.Array], jax.Array] | None = None
            for step in range(start + 1, config.total_steps + 1):
                batch = next(batches)
                if step == start + 1:
                    book.bar.set_description("compiling")
                with run.meter.paused() if step == start + 1 else contextlib.nullcontext():
                    if step == start + 1:
                        peers.compile(setup.step, run.state, batch)
                    run.state, metrics = setup.step(run.state, batch)
                book.bar.set_description(None, refresh=False)
                if pending is not None:
                    run.read(*pending, batches.wait_seconds, {})
                pending = (step, metrics, batch["index"])
                run.meter.steps += 1
                last, stop = step == config.total_steps, peers.stop(signals.caught, step)
                saving = last or stop is not None or step % config.checkpoint_every == 0
                sampling = last or step % config.sample_every == 0
                scoring = bool(setup.scoring) and (last or step % config.eval_every == 0)
                if saving or sampling or scoring:
                    with run.meter.paused():
                        measures = run.task.measure(run.average())
                    run.read(*pending, batches.wait_seconds, measures if sampling else {})
                    pending = None
                    with run.meter.paused():
                        # before the save: a run that is killed in it scores the step again
                        if scoring and stop is None and not run.score(step, signals):
                            stop = signals.caught
                        if saving or stop is not None:
                            run.save(step, measures)
                        if sampling and stop is None:
                            run.sample(step, measures)
                if stop is not None:
                    checkpoints.wait()
                    raise Stopped(stop, step)
            if run.last_grid is None:
                run.sample(start, run.task.measure(run.average()))
            assert run.last_grid is not None
            grid_path = run.last_grid
    log.info("report: %s", workdir / "report.html")
    return grid_path
