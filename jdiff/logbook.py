"""What a run writes about itself: metrics.jsonl, TensorBoard, wandb, the progress bar. Only the main process writes."""

import importlib
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jdiff.paths import whole

log = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    with path.open() as file:
        for line in file:
            try:
                records.append(json.loads(line, object_pairs_hook=_named_once))
            except json.JSONDecodeError:
                break
    return records


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record that shares its names with all others: a run reads all of its own for each report."""
    return {sys.intern(name): value for name, value in pairs}


class Logbook:
    """Writes one record a logging step, a context manager. `active` is false on all but the main process.

    Records of steps after `start_step`, left by a run that was killed, are taken out first: they will be written again.
    """

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any], *, active: bool):
        """config: the run's keys, flat; `total_steps`, `log.tensorboard` and `log.wandb` are read from it."""
        self.active, self.path = active, workdir / "metrics.jsonl"
        self._file = self._board = self._wandb = None
        self.bar = tqdm(
            total=config["total_steps"],
            initial=start_step,
            unit="step",
            smoothing=0.1,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not active,
        )
        if not active:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step]
        with whole(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a")
        if config["log.tensorboard"]:
            from tensorboard.summary import Writer

            self._board = Writer(str(workdir / "tensorboard"))
        if config["log.wandb"] != "off":
            self._wandb = _start_wandb(workdir, config["log.wandb"], config)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """One record: `metrics` are functions of the run, `speed` of the machine, where it was taken; they go to all places."""
        if not self.active:
            return
        assert self._file is not None
        self._file.write(json.dumps({"step": step, **metrics, **speed}) + "\n")
        self._file.flush()
        for name, value in {**metrics, **speed}.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**metrics, **speed}, step=step)
        if speed:
            shown = {"loss": f"{metrics['loss']:.4f}"} if "loss" in metrics else {}
            self.bar.set_postfix({**shown, "img/s": f"{speed['images_per_second']:.1f}"}, refresh=False)

    def picture(self, step: int, name: str, image: Any) -> None:
        """A PIL image for wandb; its file is the caller's (TensorBoard's own writer takes scalars only)."""
        if self._wandb is not None:
            self._wandb.log({name: importlib.import_module("wandb").Image(image)}, step=step)

    def close(self) -> None:
        """Closes the bar, the file and the writers; safe to call twice."""
        self.bar.close()
        for writer in (self._file, self._board):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._board = self._wandb = None


def _start_wandb(workdir: Path, mode: str, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"log.wandb={mode!r} needs the package wandb: pip install 'jax-jdiff[wandb]'") from error
    # the same id at each start, so that a resumed run continues its own curve
    return wandb.init(
        dir=str(workdir), mode=mode, project="jdiff", id=workdir.resolve().name, config=dict(config), resume="allow"
    )
