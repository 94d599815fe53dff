"""What row r of step s holds depends on the seed alone; a bad picture costs one picture; errors are one line."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from jdiff import data

SIZE = 8


def make_folder(folder, good=21, broken=0):
    """Pictures of one flat colour gradient each, so that a row names its picture and its flip; then broken ones."""
    for i in range(good):
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        picture[..., 0], picture[..., 1] = i, np.arange(SIZE)
        (folder / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"c{i % 3}" / f"{i:03}.png")
    for i in range(broken):
        whole = (folder / "c0" / "000.png").read_bytes()
        (folder / "c0" / f"bad{i}.png").write_bytes([b"", whole[:50], b"no picture at all"][i % 3])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 good pictures and 4 broken ones."""
    return make_folder(tmp_path_factory.mktemp("data") / "mixed", broken=4)


def take(source, steps, **options):
    """The first batches, one stacked array a key."""
    options = {"batch_size": 8, "seed": 3, "max_bad_rate": 1.0, **options}
    with data.batches(source, **options) as reader:
        rows = [next(reader) for _ in range(steps)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def equal(a, b):
    """Whether two takes are the same, bit by bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def open_folder(path):
    return data.open_source("imagefolder", path=str(path), image_size=SIZE)


def test_a_batch_has_the_promised_arrays(folder):
    source = open_folder(folder)
    got = take(source, 2)
    assert {k: (v.shape[1:], v.dtype) for k, v in got.items()} == {
        "image": ((8, SIZE, SIZE, 3), np.uint8),
        "label": ((8,), np.int32),
        "index": ((8,), np.int32),
    }
    assert (source.class_names, source.num_classes, len(source)) == (["c0", "c1", "c2"], 3, 25)
    shown = got["image"][..., 0].reshape(16, -1)[:, 0]
    assert np.array_equal(got["label"].ravel(), shown % 3)
    assert [int(source.file(i).stem) for i in got["index"].ravel()] == shown.tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_rows_do_not_depend_on_workers_processes_or_where_a_run_resumes(folder, workers, count, start):
    if workers and (count, start) not in {(1, 0), (2, 5)}:
        pytest.skip("workers take a second to start")
    source = open_folder(folder)
    whole = take(source, 9)
    for index in range(count):
        rows = range(index * 8 // count, (index + 1) * 8 // count)
        part = take(source, 9 - start, start_step=start, workers=workers, rows=rows)
        assert equal(part, {key: value[start:, rows] for key, value in whole.items()})


def test_other_seeds_give_other_orders_and_flips(folder):
    source = open_folder(folder)
    takes = [take(source, 4, seed=seed) for seed in (0, 1, 2**32, 2**40 + 1)]
    assert len({t["index"].tobytes() for t in takes}) == len({t["image"].tobytes() for t in takes}) == 4


@pytest.mark.parametrize("batch_size", [5, 7, 21, 64])
def test_an_epoch_holds_every_record_once_and_each_has_its_own_order(tmp_path, batch_size):
    source = open_folder(make_folder(tmp_path))
    order = take(source, -(-21 * 3 // batch_size), batch_size=batch_size)["index"].ravel()
    epochs = order[: 21 * 3].reshape(3, 21)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(21), (3, 1)))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    assert not any(np.array_equal(epoch, np.arange(21)) for epoch in epochs)
    assert np.array_equal(order[:40], take(source, 8, batch_size=5)["index"].ravel()), "nor does it depend on the batch"


def test_half_of_the_pictures_are_flipped_and_none_when_told_so(tmp_path):
    source = open_folder(make_folder(tmp_path))
    columns = take(source, 250)["image"][:, :, 0, :, 1].reshape(-1, SIZE)
    mirrored = (columns == np.arange(SIZE)[::-1]).all(1)
    assert np.all(mirrored | (columns == np.arange(SIZE)).all(1))
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(columns))
    assert np.all(take(source, 20, flip=False)["image"][:, :, 0, :, 1] == np.arange(SIZE))
    again = take(source, 60)
    flips = {}
    for index, picture in zip(again["index"].ravel(), again["image"].reshape(-1, SIZE, SIZE, 3), strict=True):
        flips.setdefault(int(index), set()).add(bool(picture[0, 0, 1]))
    assert sum(len(f) == 2 for f in flips.values()) > 15, "a record's flip must change from epoch to epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_replaced_and_listed_once(folder, tmp_path, workers):
    source, log = open_folder(folder), tmp_path / "run" / "bad.jsonl"
    bad = {i for i in range(25) if source.file(i).stem.startswith("bad")}
    got = take(source, 20, workers=workers, bad_log=log)
    assert not bad & set(got["index"].ravel().tolist())
    take(source, 20, workers=workers, bad_log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(str(source.file(i)) for i in bad)
    assert all(line["reason"] and "\n" not in line["reason"] for line in lines)


def test_a_log_that_a_crash_cut_off_is_carried_on(folder, tmp_path):
    log = tmp_path / "bad.jsonl"
    log.write_text('{"path": "x}')
    take(open_folder(folder), 10, bad_log=log)
    assert log.read_text().count('"reason"') == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_pictures_stop_the_run(tmp_path, workers):
    source = open_folder(make_folder(tmp_path / "d", good=110, broken=30))
    log = tmp_path / "bad.jsonl"
    take(source, 40, max_bad_rate=0.25, workers=workers)
    with pytest.raises(data.DataError) as caught:
        take(source, 40, max_bad_rate=0.1, bad_log=log, workers=workers)
    line = str(caught.value)
    assert str(log) in line and "0.1" in line and "\n" not in line and log.exists()


def test_few_records_are_no_reason_to_stop(tmp_path):
    source = open_folder(make_folder(tmp_path, good=200, broken=60))
    with data.batches(source, batch_size=4, seed=0, max_bad_rate=0.01) as reader:
        for _ in range(20):  # 80 of the 100 that must be seen first, less what was broken
            next(reader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_broken_pictures_alone_ends_at_once(tmp_path, workers):
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    log = tmp_path / "bad.jsonl"
    with pytest.raises(data.DataError) as caught:
        take(open_folder(tmp_path), 1, workers=workers, bad_log=log)
    assert "\n" not in str(caught.value) and len(log.read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("imagfolder", "x", "openmoji, imagefolder, tfds, latents or noise"),
        ("imagefolder", None, "data.path is missing"),
        ("imagefolder", "{tmp}/none", "does not exist"),
        ("imagefolder", "{tmp}", "holds no pictures"),
        ("imagefolder", "{tmp}/file", "not a folder"),
        ("latents", "{tmp}", "meta.json is missing"),
        ("latents", "{tmp}/file", "no finished cache"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, name, path, words):
    (tmp_path / "file").write_text("x")
    path = path and path.format(tmp=tmp_path)
    with pytest.raises(data.DataError) as caught:
        data.open_source(name, path=path, image_size=SIZE)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_device_batches_keep_order_run_ahead_and_close(folder):
    source, seen = open_folder(folder), []
    with data.batches(source, batch_size=8, seed=3, max_bad_rate=1.0) as reader:
        expected = [next(reader)["index"] for _ in range(6)]

    def put(batch):
        seen.append(threading.current_thread())
        return batch["index"]

    before = threading.active_count()
    reader = data.batches(source, batch_size=8, seed=3, max_bad_rate=1.0)
    with data.to_device(reader, put, depth=2) as batches:
        got = [next(batches) for _ in range(6)]
        assert batches.wait_seconds >= 0
    assert np.array_equal(got, expected) and threading.main_thread() not in seen
    assert len(seen) <= 6 + 2 + 1, "no more than `depth` batches ahead, and one in hand"
    assert threading.active_count() <= before + 2


def test_a_threads_error_reaches_the_loop_every_time(folder):
    def put(batch):
        raise OSError("device full")

    with data.to_device(data.batches(open_folder(folder), batch_size=8, seed=0), put) as batches:
        for _ in range(2):
            with pytest.raises(OSError, match="device full"):
                next(batches)


def test_importing_the_package_is_light(commands):
    heavy = ("jax", "grain", "PIL", "torch", "tensorflow_datasets", "resvg_py")
    found = commands.run("-c", f"import sys, jdiff.data; print([m for m in {heavy} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr
