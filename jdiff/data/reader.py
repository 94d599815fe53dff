"""The one pipeline from any source to batches on the device.

What row r of step s holds is a function of (seed, s, r): the order is Grain's shuffle seen as a random-access list, and the
crop, flip and posterior noise come from a generator keyed by (seed, position). So a run may be resumed at any step, with
other numbers of processes and workers, and see the same records.
"""

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.data.source import BrokenRecord, DataError, Source

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]
MOST_TRIES = 1_000
"""Records tried in the place of a broken one before the data is given up."""


class _Steps:
    """Random access to this process's rows of each step's batch; what Grain's workers call."""

    def __init__(self, source: Source, batch_size: int, seed: int, first: int, flip: bool, index: int, count: int):
        self.source, self.batch_size, self.seed, self.first, self.flip = source, batch_size, seed, first, flip
        self.rows = batch_size // count
        self.offset = index * self.rows
        self._order: Any = None

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size - self.first - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._order is None:
            import grain

            self._order = grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat(None)
        start = (self.first + index) * self.batch_size + self.offset
        records, broken = [], []
        for position in range(start, start + self.rows):
            records.append(self._record(position, broken))
        batch = {self.source.kind: np.stack([record[self.source.kind] for record in records])}
        batch |= {key: np.asarray([r[key] for r in records], np.int32) for key in ("label", "index")}
        return {"batch": batch, "broken": broken}

    def _record(self, position: int, broken: list[tuple[int, str, str]]) -> dict[str, Any]:
        """The record at a position of the stream; a broken one is replaced by the next in this epoch's order."""
        size = len(self.source)
        epoch, place = divmod(position, size)
        for attempt in range(min(size, MOST_TRIES)):
            rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, position]))
            flip = self.flip and bool(rng.random() < 0.5)
            index = int(self._order[epoch * size + (place + attempt) % size])
            try:
                return {**self.source.read(index, flip, rng), "index": index}
            except BrokenRecord as error:
                broken.append((index, error.where, error.reason))
        raise DataError(f"{len(broken)} records in a row cannot be read; the last: {broken[-1][1]}: {broken[-1][2]}")


class batches:
    """An endless iterator over this process's rows of every global batch; a context manager that ends its workers.

    Yields {"image": uint8 (b, H, W, 3) | "latent": float32 (b, H, W, C), "label": int32 (b,), "index": int32 (b,)}, where b is
    batch_size / process_count and `index` is the record's number in the source. workers: processes that read ahead, 0 for a
    thread. Broken records are replaced, appended to `bad_log` with the reason, and DataError is raised when more than
    `max_bad_rate` of the distinct records seen (100 at least, or all there are) are broken.
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
        process_index: int = 0,
        process_count: int = 1,
        bad_log: Path | None = None,
        max_bad_rate: float = 0.35,
    ):
        import grain

        if batch_size % process_count:
            raise DataError(f"batch_size={batch_size} does not divide over {process_count} processes")
        steps = _Steps(source, batch_size, seed, start_step, flip, process_index, process_count)
        # one thread of reading ahead: pictures decode outside the interpreter's lock, and order stays as it is
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
        if workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain's workers read absl's flags, which jdiff does not use
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
        self._iterator, self._shared = iter(dataset), workers > 0
        self._broken = BrokenLog(len(source), bad_log, max_bad_rate)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._iterator)
        self._broken.note(step["batch"]["index"], step["broken"])
        if (
            self._shared
        ):  # a worker's arrays lie in shared memory, which must not outlive it in a device's zero-copy view
            return {name: np.array(rows) for name, rows in step["batch"].items()}
        return step["batch"]

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
        self._written = {json.loads(line)["path"] for line in lines if line.endswith("}")}

    def note(self, index_B: np.ndarray, broken: list[tuple[int, str, str]]) -> None:
        """One batch's records, and those that were broken in it."""
        self._seen[index_B] = True
        for index, where, reason in broken:
            if not self._bad[index]:
                self._seen[index] = self._bad[index] = True
                self._write(where, reason)
        if broken:
            seen, bad = int(self._seen.sum()), int(self._bad.sum())
            if seen >= self._least and bad > self._max_rate * seen:
                raise DataError(
                    f"{bad} of {seen} records seen cannot be read, more than data.max_bad_rate={self._max_rate}; "
                    f"they are listed in {self._path}: mend or remove them, or raise the rate"
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


class DeviceBatches:
    """Batches put on the device by a thread, `depth` ahead of the loop that takes them.

    wait_seconds: how long the loop has stood still for data. An error of the thread is raised in the loop.
    """

    def __init__(self, reader: batches, put: Callable[[Batch], Any], depth: int):
        self.wait_seconds = 0.0
        self._reader, self._put = reader, put
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
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
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def __iter__(self) -> Iterator[Any]:
        return self

    def __enter__(self) -> "DeviceBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._reader.close()


def to_device(reader: batches, put: Callable[[Batch], Any], depth: int = 2) -> DeviceBatches:
    """Wraps a reader; `put` turns a batch of numpy rows into one on the device."""
    return DeviceBatches(reader, put, depth)
