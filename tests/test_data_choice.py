"""Pictures chosen and mixed: some classes of a source, one prompt for a folder, and DreamBooth's two sets in turn."""

import numpy as np
import pytest
from PIL import Image

from jdiff import data
from jdiff.data.captions import Captions
from jdiff.data.prior import WithPrior

RNG = np.random.default_rng(0)


@pytest.fixture
def folders(tmp_path):
    """Three pictures of a subject, five of its class, by colour."""
    for name, count, colour in (("subject", 3, (200, 0, 0)), ("class", 5, (0, 0, 200))):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_classes_are_chosen_by_name():
    whole = data.open_source("openmoji", image_size=8)
    some = data.open_source("openmoji", image_size=8, only="Food & Drink, Flags")
    wanted = [i for i, label in enumerate(whole.labels) if whole.class_names[label] in ("Food & Drink", "Flags")]
    assert len(some) == len(wanted) and some.num_classes == whole.num_classes
    assert some.fingerprint != whole.fingerprint
    for i in (0, len(some) - 1):
        found, expected = some.read(i, False, RNG), whole.read(wanted[i], False, RNG)
        np.testing.assert_array_equal(found["image"], expected["image"])
        assert found["caption"] == expected["caption"] == some.texts(i)[0]


def test_an_unknown_class_is_named(folders):
    with pytest.raises(data.DataError, match=r"'Flag' is no class.*did you mean 'Flags'"):
        data.open_source("openmoji", image_size=8, only="Flag")
    with pytest.raises(data.DataError, match="classes can be chosen of"):
        data.open_source("captions", path=str(folders / "subject"), image_size=8, prompt="a thing", only="subject")


def test_one_prompt_serves_a_folder(folders):
    source = data.open_source("captions", path=str(folders / "subject"), image_size=8, prompt="a sks dog")
    assert len(source) == 3 and source.read(2, False, RNG)["caption"] == "a sks dog"
    (folders / "subject" / "0.txt").write_text("mine")
    for prompt, said in (("a sks dog", "is a caption; leave the prompt out"), (" ", "captions.prompt is blank")):
        with pytest.raises(data.DataError, match=said):
            data.open_source("captions", path=str(folders / "subject"), image_size=8, prompt=prompt)
    with pytest.raises(data.DataError, match=r"is for data\.name='captions'"):
        data.open_source("openmoji", image_size=8, prompt="a sks dog")


def test_a_prior_takes_every_other_turn(folders):
    subject, prior = (
        Captions(str(folders / name), 8, prompt=text) for name, text in (("subject", "a sks dog"), ("class", "a dog"))
    )
    both = WithPrior(subject, prior, 0.5)
    assert len(both) == 10
    for i in range(len(both)):
        record = both.read(i, False, RNG)
        kind = i % 2
        assert record["caption"] == both.texts(i)[0] == ("a sks dog", "a dog")[kind]
        assert record["weight"] == (1.0, 0.5)[kind] and record["image"][0, 0, 2 * kind] > 100
    batch = next(iter(data.batches(both, batch_size=4, seed=0)))
    assert batch["weight"].dtype == np.float32 and batch["weight"].shape == (4,)


@pytest.mark.parametrize(("path", "kind", "classes"), [("8x4x4:10", "latent", 10), ("8x4x3", "image", 1)])
def test_noise_stands_for_data(path, kind, classes):
    source = data.open_source("noise", path=path)
    record = source.read(classes + 2, False, np.random.default_rng(0))
    again = source.read(classes + 2, False, np.random.default_rng(0))
    assert source.shape == record[kind].shape and source.kind == kind and source.num_classes == classes
    assert record["label"] == (classes + 2) % classes and source.texts(0) == [record["caption"]]
    np.testing.assert_array_equal(record[kind], again[kind])
    assert record[kind].dtype == (np.uint8 if kind == "image" else np.float32)


@pytest.mark.parametrize("path", ["8x8", "8x0x3", "8x8x4:0", "FOLDER"])
def test_noise_of_no_shape_is_one_line(path):
    with pytest.raises(data.DataError, match=r"HEIGHTxWIDTHxCHANNELS:CLASSES"):
        data.open_source("noise", path=path)
