"""A TensorFlow Datasets set on disk is read without TensorFlow."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from jdiff import data

COLORS = np.random.default_rng(0).integers(0, 256, (12, 3), dtype=np.uint8)
NAMES = ["ant", "bee", "cat"]


def write_set(folder, channels=3, damaged=(), file_format="array_record", split="train", features=None):
    """A built set of plain pictures, one colour each, labels going round: what `download_and_prepare` leaves behind."""
    tfds = pytest.importorskip("tensorflow_datasets")
    array_record = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.proto import tf_example_pb2

    folder = folder / "plain" / "1.0.0"
    folder.mkdir(parents=True)
    image = tfds.features.Image(shape=(None, None, channels))
    features = features or {"image": image, "label": tfds.features.ClassLabel(names=NAMES)}
    tfds.features.FeaturesDict(features).save_config(str(folder))
    shard = str(folder / f"plain-{split}.{file_format}-00000-of-00001")
    writer, lengths = array_record.ArrayRecordWriter(shard, "group_size:1"), []
    for i, color in enumerate(COLORS):
        pixels = np.broadcast_to(color[:channels], (10, 14, channels)).squeeze()
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
        example = tf_example_pb2.Example()
        content = b"no picture" if i in damaged else file.getvalue()
        example.features.feature["image"].bytes_list.value.append(content)
        example.features.feature["label"].int64_list.value.append(i % 3)
        lengths.append(len(example.SerializeToString()))
        writer.write(example.SerializeToString())
    writer.close()
    split_info = {
        "name": split,
        "shardLengths": [str(len(COLORS))],
        "numBytes": str(sum(lengths)),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "plain", "version": "1.0.0", "fileFormat": file_format, "splits": [split_info]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("channels", [3, 1])
def test_records_are_read_without_tensorflow(tmp_path, channels):
    source = data.open_source("tfds", path=str(write_set(tmp_path, channels)), image_size=8)
    assert len(source) == 12 and source.class_names == NAMES and source.shape == (8, 8, 3)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i, color in enumerate(COLORS):
            record = copy.read(i, False, np.random.default_rng(0))
            expected = color if channels == 3 else np.repeat(color[:1], 3)
            np.testing.assert_array_equal(record["image"], np.broadcast_to(expected, (8, 8, 3)))
            assert record["label"] == i % 3
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_is_replaced(tmp_path, workers):
    folder = write_set(tmp_path, damaged=[5])
    source = data.open_source("tfds", path=str(folder), image_size=8)
    log = tmp_path / "bad.jsonl"
    with data.batches(source, batch_size=4, seed=0, workers=workers, bad_log=log) as reader:
        for _ in range(6):
            batch = next(reader)
            assert 5 not in batch["index"]
            np.testing.assert_array_equal(batch["image"][:, 0, 0], COLORS[batch["index"]])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"{folder}[5]"]


def message(path):
    """The one line that opening `path` ends with."""
    with pytest.raises(data.DataError) as caught:
        data.open_source("tfds", path=str(path), image_size=8)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_set_of_tfrecords_says_what_to_do(tmp_path):
    assert "array_record" in message(write_set(tmp_path, file_format="tfrecord"))


def test_what_cannot_be_read_is_one_line(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    assert "train" in message(write_set(tmp_path / "a", split="test"))
    text = {"text": tfds.features.Text()}
    assert "`image`" in message(write_set(tmp_path / "b", features=text))
    image = tfds.features.Image(shape=(None, None, 3))
    assert "`label`" in message(write_set(tmp_path / "c", features={"image": image, "label": np.int64}))
    assert "folder" in message(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    message(tmp_path / "empty")
    assert len(message("no_such_set")) < 300


def test_an_emptied_file_of_records_is_broken_records(tmp_path):
    folder = write_set(tmp_path)
    next(folder.glob("*.array_record*")).write_bytes(b"")
    source = data.open_source("tfds", path=str(folder), image_size=8)
    with pytest.raises(data.BrokenRecord):
        source.read(0, False, np.random.default_rng(0))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match=r"pip install 'jax-jdiff\[tfds\]'$"):
        data.open_source("tfds", path="mnist", image_size=8)
