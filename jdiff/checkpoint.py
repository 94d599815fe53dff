"""Checkpoints that describe themselves, kept by Orbax under WORKDIR/checkpoints/STEP.

Each holds the items of a training state, saved apart so that sampling reads only what it needs, and `meta`: the step, the
config, a record of each model (`models.describe`), jdiff's version and git revision, each array's dtype and shape, and each
array's checksum.

The resume ladder, in this one place:
1. the newest checkpoint in the workdir, if its arrays are those of the model at hand (else: an error that lists the
   differences; nothing is cast, zero-filled or left out) and every checksum agrees;
2. when it is damaged: said aloud, and the next older one is tried; once one is whole, the damaged ones are moved to
   WORKDIR/damaged, out of the way of the steps to come;
3. when there are checkpoints and none is whole: an error, and nothing is moved, since starting anew would hide the loss;
4. when there are none: a fresh start.
"""

import contextlib
import importlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax

from jdiff import tree
from jdiff.version import __version__

log = logging.getLogger(__name__)
Items = Mapping[str, Any]
FORMAT = 2
SPLIT = 2**20
"""Bytes that a replica writes at least when replicas share the writing of an array."""
PATIENCE = 7 * 24 * 3600
"""Seconds that a save may take. Orbax reads them off the wall clock: of its 1200 a clock that is set right leaves none."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that says why and what to do."""


class Damaged(CheckpointError):
    """A checkpoint whose content is not what was saved."""


@cache
def _orbax() -> Any:
    _hush()
    ocp = importlib.import_module("orbax.checkpoint")
    # by default each replica writes its part of every array, and a slice of each shape compiles: seconds for small ones
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SPLIT)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    _count_nothing()
    return ocp


def _count_nothing() -> None:
    """Orbax reads TensorStore's counters twice an item to log a rate, and has no option not to: the lists that TensorStore makes
    of them for Python are never given back, 60 KB a save (docs/reliability.md)."""
    counters: Any = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    assert callable(counters.get_tensorstore_raw_bytes)
    counters.get_tensorstore_raw_bytes = lambda *_: 0


def _hush() -> None:
    """Orbax narrates through absl; its failures are told by us, in a line, and not once more for each array.

    The arrays of a save that failed are written on while its event loop is gone: asyncio logs what nobody awaited, and
    TensorStore's threads, that the loop is closed.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook = sys.unraisablehook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else hook(args)


def git_revision() -> str | None:
    """The revision of the source tree that runs, marked `+` when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True)  # noqa: E731
        changed = run("status", "--porcelain", "--untracked-files=no", ".").stdout.strip()
        return run("rev-parse", "HEAD").stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def steps(workdir: Path) -> list[int]:
    """The committed checkpoints' steps, oldest first; unfinished ones have other names and do not count."""
    folder = workdir / "checkpoints"
    found = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()] if folder.is_dir() else []
    return sorted(found)


class Checkpoints:
    """The checkpoints of one workdir, for writing; a context manager whose end waits for saves under way."""

    def __init__(self, workdir: Path, keep: int):
        ocp = _orbax()
        self.workdir = workdir
        folder = (workdir / "checkpoints").resolve()
        for unfinished in folder.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed in a save
        # folders made beside the run are waited for by the wall clock too, for 300 seconds that are no option
        patient = ocp.AsyncOptions(timeout_secs=PATIENCE, create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, async_options=patient)
        self.manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, items: Items, facts: Mapping[str, Any]) -> None:
        """Starts a save of `items` (name -> tree) with `facts` in its metadata; an earlier save's failure is raised here.

        FloatingPointError when a number is not finite: such a state is never written.
        """
        if bad := tree.not_finite(dict(items)):
            raise FloatingPointError(f"step {step} is not saved: {bad[0]} and {len(bad) - 1} more hold NaN or infinity")
        ocp = _orbax()
        arrays = {path: tree.describe(leaf) for path, leaf in tree.flatten(dict(items)).items()}
        meta = {
            "format": FORMAT,
            "step": step,
            "jdiff_version": __version__,
            "git_revision": git_revision(),
            "arrays": arrays,
            "checksums": tree.checksums(dict(items)),
            **facts,
        }
        meta = json.loads(json.dumps(meta))
        meta["self"] = tree.digest(meta)
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items() if jax.tree.leaves(item)}
        with self._writing():
            self.manager.check_for_errors()
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saves))

    def wait(self) -> None:
        """Blocks until every started save is durable; CheckpointError when one failed."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads; CheckpointError when a save failed."""
        try:
            self.wait()
        finally:
            self.manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A failure to write, which Orbax may tell of by any exception, as a CheckpointError."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint in {self.workdir} could not be written ({_line(error)}); those that are there are whole: "
                "make room or mend the disk, and the same command goes on from the newest"
            ) from error

    def restore_newest(self, target: Callable[[dict[str, Any]], Items]) -> tuple[Items, dict[str, Any]] | None:
        """Climbs the resume ladder: (items, metadata) of the newest whole checkpoint, or None for a fresh start.

        `target(meta)` gives the trees of ShapeDtypeStructs with shardings to restore into.
        """
        there = steps(self.workdir)
        if not there:
            return None

        def read(step: int) -> tuple[Items, dict[str, Any]]:
            meta = read_meta(self.workdir, step)
            return restore(self.workdir, step, target(meta), meta), meta

        return newest_whole(there, read, self._move_aside)

    def _move_aside(self, step: int) -> None:
        aside = self.workdir / "damaged" / str(step)
        log.warning("moved the damaged checkpoint to %s", aside)
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.workdir / "checkpoints" / str(step), aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("moved aside")
        self.manager.reload()


T = TypeVar("T")


def newest_whole(there: list[int], read: Callable[[int], T], damaged: Callable[[int], None] = lambda step: None) -> T:
    """`read(step)` for the newest step whose read is not `Damaged`; each damaged one is said aloud.

    `damaged` is called with each of those once a whole one is found: where none is, the reader may be at fault.
    """
    broken = []
    for step in reversed(there):
        try:
            found = read(step)
        except Damaged as error:
            log.warning("%s; trying the one before", error)
            broken.append(step)
            continue
        for newer in broken:
            damaged(newer)
        return found
    raise CheckpointError(f"none of the checkpoints of steps {there} is whole; start in another --workdir")


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """A checkpoint's metadata; Damaged when it is unreadable or not what was written."""
    folder = workdir / "checkpoints" / str(step)
    ocp = _orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler())) as checkpointer:
            meta = checkpointer.restore(folder.resolve(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        found = meta.pop("self")
        whole = found == tree.digest(meta)
    except Exception as error:  # whatever a reader makes of damaged bytes
        raise Damaged(f"checkpoint {folder} is damaged: its metadata is unreadable ({_line(error)})") from error
    if not whole:
        raise Damaged(f"checkpoint {folder} is damaged: its metadata is not what was written")
    if meta["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {meta['format']}, and this jdiff reads {FORMAT}: use the jdiff "
            f"({meta['jdiff_version']}, git {meta['git_revision']}) that wrote it"
        )
    return meta


def shapes(meta: Mapping[str, Any], item: str, all_items: tuple[str, ...], where: jax.sharding.Sharding) -> Any:
    """An item's tree as ShapeDtypeStructs on `where`, from the metadata alone; for items that are nested dicts.

    all_items: the items whose union is the full tree: the places of the others' leaves hold None, as they were saved.
    """
    result: dict[str, Any] = {}
    known = {path.partition("/")[2] for path in meta["arrays"] if path.startswith(tuple(f"{i}/" for i in all_items))}
    for path in sorted(known):
        *parents, name = path.split("/")
        group = result
        for parent in parents:
            group = group.setdefault(parent, {})
        text = meta["arrays"].get(f"{item}/{path}")
        dtype, _, shape = text.removesuffix("]").partition("[") if text else ("", "", "")
        size = tuple(int(n) for n in shape.split(",") if n)
        group[name] = jax.ShapeDtypeStruct(size, dtype, sharding=where) if text else None
    return result


def restore(workdir: Path, step: int, target: Items, meta: dict[str, Any]) -> Items:
    """The items that `target` names, on its shardings.

    CheckpointError lists the differences when the arrays are another model's; Damaged when one is not what was saved.
    """
    folder = workdir / "checkpoints" / str(step)
    names = tuple(f"{name}/" for name in target)
    expected = {path: tree.describe(leaf) for path, leaf in tree.flatten(dict(target)).items()}
    found = {path: text for path, text in meta["arrays"].items() if path.startswith(names)}
    if expected != found:
        wrong = [f"{path} expected {expected[path]}, found {found.get(path, 'nothing')}" for path in expected]
        wrong = [line for path, line in zip(expected, wrong, strict=True) if found.get(path) != expected[path]]
        wrong += [f"{path} {text} is not part of this model" for path, text in found.items() if path not in expected]
        raise CheckpointError(
            f"checkpoint {folder} is of another model: {len(wrong)} array(s) differ, first: {wrong[0]}; "
            "use another --workdir or the config it was made with"
        )
    ocp = _orbax()
    full = {name: item for name, item in target.items() if jax.tree.leaves(item)}
    handlers = {name: ocp.StandardCheckpointHandler() for name in full}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            args = {name: ocp.args.StandardRestore(item) for name, item in full.items()}
            restored = checkpointer.restore(folder.resolve(), args=ocp.args.Composite(**args))
    except Exception as error:
        raise Damaged(f"checkpoint {folder} is damaged: {_line(error)}") from error
    items = {name: restored[name] if name in full else item for name, item in target.items()}
    for path, value in tree.checksums(items).items():
        if value != meta["checksums"][path]:
            raise Damaged(f"checkpoint {folder} is damaged: the checksum of {path} does not agree")
    return items


def _line(error: BaseException) -> str:
    """An exception as one short line: its beginning says what, its end why."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if len(line) <= 300 else f"{line[:140]} … {line[-155:]}"
