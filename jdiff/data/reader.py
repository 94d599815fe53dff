"""The one pipeline from any source to batches on the device.

What row r of step s holds is a function of (seed, s, r): each epoch's order comes from a generator keyed by (seed, epoch),
the flip, the posterior's noise and a transform's draws from one keyed by (seed, position in the stream). So a run may be
resumed at any step, with other numbers of processes and workers, and see the same records.
"""

import itertools
import json
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.data.order import ByBucket, Order, Shuffled, generator, rekey
from jdiff.data.source import BrokenRecord, DataError, Source

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
MOST_TRIES = 1_000
"""Records tried in the place of a broken one before the data is given up."""


class _Steps:
    """Random access to this process's rows of each step's batch; what Grain's workers call."""

    def __init__(
        self,
        source: Source,
        order: Order,
        seed: int,
        first: int,
        flip: bool,
        transform: Transform | None,
        rows: Sequence[int],
        batch_size: int,
    ):
        self.source, self.order, self.seed, self.first = source, order, seed, first
        self.flip, self.transform, self.rows, self.batch_size = flip, transform, rows, batch_size

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size - self.first - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, broken = self.first + index, []
        rng = generator(self.seed, 0)
        for turn in range(self.order.turns):
            records = []
            for row in self.rows:
                record = self._record(step, row, turn, rng, broken)
                if record is None:
                    break
                records.append(record)
            else:
                return {"batch": stack(records), "broken": broken}
            if len(broken) >= MOST_TRIES:
                break
        return {"batch": {}, "broken": broken}

    def _record(
        self, step: int, row: int, turn: int, rng: np.random.Generator, broken: list[tuple[int, str, str]]
    ) -> dict[str, Any] | None:
        """One row; a broken record is replaced by the order's next candidate. None when there is no more to try."""
        for index in itertools.islice(self.order.candidates(step, row, turn), MOST_TRIES):
            rekey(rng, step * self.batch_size + row)
            flip = self.flip and bool(rng.random() < 0.5)
            try:
                record = self.source.read(index, flip, rng)
                if self.transform is not None:
                    record = self.transform(record, rng)
            except BrokenRecord as error:
                broken.append((index, error.where, error.reason))
            else:
                return {**record, "index": index}
        return None


def stack(records: list[dict[str, Any]]) -> Batch:
    """Records as one batch: integers as int32, floats as float32, arrays in their own type; strings are left out.

    DataError names a value that is neither, or rows that differ in shape, type or keys.
    """
    batch = {}
    for key in dict.fromkeys(key for record in records for key in record):
        values = [record[key] for record in records if key in record]
        if len(values) != len(records):
            raise DataError(
                f"{key!r} is in {len(values)} of a batch's {len(records)} records: it must be in all or none"
            )
        first = values[0]
        if isinstance(first, str):
            continue
        if not isinstance(first, np.ndarray | np.generic | int | float):
            raise DataError(f"{key!r} of a record is of type {type(first).__name__}: use numbers, arrays or strings")
        python = {bool: np.bool_, int: np.int32, float: np.float32}.get(type(first))
        rows = [np.asarray(value) if python is None else python(value) for value in values]
        found = {(row.dtype, row.shape) for row in rows}
        if len(found) > 1:
            kinds = sorted(f"{dtype} {list(shape)}" for dtype, shape in found)
            raise DataError(f"{key!r} differs between the records of a batch: {' and '.join(kinds[:3])}")
        batch[key] = np.stack(rows)
    return batch


def _start_worker(worker: int, workers: int) -> None:
    """What Grain leaves undone: Ctrl-C, which reaches all processes of a terminal, is the main one's to handle, and a worker
    whose main process was killed must not stay behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="jdiff-parent", daemon=True).start()


class batches:
    """An endless iterator over this process's rows of every global batch; a context manager that ends its workers.

    Yields {"image": uint8 (b, H, W, 3) | "latent": float32 (b, H, W, C), "label": int32 (b,), "index": int32 (b,)}, where b is
    the number of `rows` and `index` is the record's number in the source; also what else is a number or an array in the
    source's records. rows: which of a global batch's this process reads; all when None. workers: processes that read ahead, 0
    for a thread. transform: a picklable (record, rng) -> record, called for each record where it is read; all that is random in
    it comes from `rng`, and it may raise BrokenRecord.
    Broken records are replaced, appended to `bad_log` with the reason, and DataError is raised when more than `max_bad_rate`
    of the distinct records seen (100 at least, or all there are) are broken.

    A source with buckets gives batches of one bucket each, so that H and W change from batch to batch; every process sees the
    same bucket. An epoch is then a whole number of batches, and the table of buckets is logged.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        flip: bool = True,
        workers: int = 0,
        rows: Sequence[int] | None = None,
        bad_log: Path | None = None,
        max_bad_rate: float = 0.35,
        transform: Transform | None = None,
    ):
        import grain

        if source.buckets is None:
            order = Shuffled(len(source), batch_size, seed)
        else:
            order = ByBucket(source.buckets.of, batch_size, seed)
            log.info("batches of %s:\n%s", source.name, source.buckets.table(batch_size))
        rows = range(batch_size) if rows is None else rows
        steps = _Steps(source, order, seed, start_step, flip, transform, rows, batch_size)
        # two threads read ahead: pictures decode outside the interpreter's lock, and order stays as it is
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags, which jdiff does not use
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), _start_worker
            )
        self._iterator, self._shared = iter(dataset), workers > 0
        self._broken = BrokenLog(len(source), bad_log, max_bad_rate)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._iterator)
        batch, broken = step["batch"], step["broken"]
        self._broken.note(batch.get("index", []), broken)
        if not batch:
            raise DataError(
                f"{len(broken)} records in a row cannot be read; the last: {broken[-1][1]}: {broken[-1][2]}"
            )
        # a worker's arrays lie in shared memory, which must not outlive it in a device's zero-copy view
        return {name: np.array(rows) for name, rows in batch.items()} if self._shared else batch

    def __enter__(self) -> "batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes and threads."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()


class BrokenLog:
    """Counts distinct records seen and broken, writes each broken one down once, and says when there are too many."""

    def __init__(self, size: int, path: Path | None, max_rate: float):
        self._seen, self._bad = np.zeros(size, bool), np.zeros(size, bool)
        self._path, self._max_rate, self._least = path, max_rate, min(100, size)
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._written = set(filter(None, map(_logged_path, lines)))

    def note(self, index_B: Sequence[int] | np.ndarray, broken: list[tuple[int, str, str]]) -> None:
        """One batch's records, and those that were broken in it."""
        self._seen[np.asarray(index_B, int)] = True
        for index, where, reason in broken:
            if not self._bad[index]:
                self._seen[index] = self._bad[index] = True
                self._write(where, reason)
        if broken:
            seen, bad = int(self._seen.sum()), int(self._bad.sum())
            if seen >= self._least and bad > self._max_rate * seen:
                raise DataError(
                    f"{bad} of {seen} records seen cannot be read, more than data.max_bad_rate={self._max_rate}; "
                    + (f"they are listed in {self._path}: " if self._path else "")
                    + "mend or remove them, or raise the rate"
                )

    def _write(self, where: str, reason: str) -> None:
        if where in self._written:
            return
        self._written.add(where)
        log.warning("skipped %s: %s", where, reason)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps({"path": where, "reason": reason}) + "\n")


def _logged_path(line: str) -> str | None:
    """The picture that a line of the log names; None where the line was cut off by a crash."""
    try:
        return json.loads(line)["path"]
    except (ValueError, TypeError, KeyError):
        return None


class DeviceBatches:
    """Batches put on the device by a thread, `depth` ahead of the loop that takes them.

    wait_seconds: how long the loop has stood still for data. An error of the thread is raised in the loop.
    """

    def __init__(self, reader: batches, put: Callable[[Batch], Any], depth: int):
        self.wait_seconds = 0.0
        self._reader, self._put = reader, put
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="jdiff-data", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                self._offer(self._put(next(self._reader)))
        except BaseException as error:
            self._offer(error)

    def _offer(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> Any:
        start = time.perf_counter()
        item = self._queue.get() if self._error is None else self._error
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._error = item
            raise item
        return item

    def __iter__(self) -> Iterator[Any]:
        return self

    def __enter__(self) -> "DeviceBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self._error = self._error or DataError("these batches are closed")
        self._stop.set()
        self._thread.join(timeout=10)
        self._reader.close()


def to_device(reader: batches, put: Callable[[Batch], Any], depth: int = 2) -> DeviceBatches:
    """Wraps a reader; `put` turns a batch of numpy rows into one on the device."""
    return DeviceBatches(reader, put, depth)
