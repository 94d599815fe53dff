"""Every mistake in a config is one line that names the key; every config of the project is sound."""

import json
import runpy
from pathlib import Path

import pytest

from jdiff import config as configs
from jdiff.models import list_models

ROOT = Path(__file__).parent.parent


def _line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("optim.lrr", "optim.lr"), ("bach_size", "batch_size"), ("data.nam", "data.name"), ("model.widht", "model.width")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError) as error:
        configs.override(configs.default(), key, "1")
    assert key in _line(error) and f"did you mean {nearest!r}" in _line(error)


def test_a_group_is_no_key():
    with pytest.raises(ValueError) as error:
        configs.override(configs.default(), "optim", "1")
    assert "optim.lr" in _line(error)


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("total_steps", "many", "int"),
        ("total_steps", "1.5", "int"),
        ("optim.lr", "fast", "float"),
        ("data.flip", "maybe", "boolean"),
        ("optim.clip_norm", "x", "float"),
        ("model.depth", "two", "int"),
        ("model.learn_sigma", "2", "boolean"),
        ("batch_size", "none", "int"),
    ],
)
def test_a_wrong_type_names_key_and_type(key, text, kind):
    config = configs.default()
    before = config.to_json()
    with pytest.raises(ValueError) as error:
        configs.override(config, key, text)
    assert key in _line(error) and text in _line(error) and kind in _line(error)
    assert config.to_json() == before


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("total_steps", "1_000", 1000),
        ("optim.lr", "2e-4", 2e-4),
        ("optim.lr", "1", 1.0),
        ("data.flip", "False", False),
        ("data.flip", "yes", True),
        ("model.depth", "3", 3),
        ("model.learn_sigma", "false", False),
        ("data.path", "a=b c", "a=b c"),
        ("optim.clip_norm", "0.5", 0.5),
        ("model.remat", "none", "none"),  # a value, where the field's own default is "dots"
        ("model.depth", "none", None),
        ("optim.clip_norm", "None", None),
    ],
)
def test_an_override_has_the_keys_type(key, text, value):
    config = configs.default()
    configs.override(config, key, text)
    found = configs.flat(config)[key]
    assert found == value and type(found) is type(value)


def test_an_optional_key_can_be_emptied_and_set_again():
    config = configs.default()
    for text, value in (("0.5", 0.5), ("none", None), ("2", 2.0)):
        configs.override(config, "optim.clip_norm", text)
        assert config.optim.clip_norm == value


def having(key):
    """The default of a task that has this key."""
    return next(c for c in map(configs.default, configs.TASKS) if key in configs.flat(c))


@pytest.mark.parametrize("key", configs.CHOICES)
def test_each_choice_is_checked(key):
    config = having(key)
    configs.override(config, key, configs.CHOICES[key][-1] + "x")
    with pytest.raises(ValueError) as error:
        configs.check(config)
    assert key in _line(error) and f"did you mean {configs.CHOICES[key][-1]!r}" in _line(error)


def test_the_sampler_must_fit_the_kind():
    config = configs.default()
    config.diffusion.kind = "flow"
    with pytest.raises(ValueError, match=r"sample\.sampler='ddim'.*euler.*heun"):
        configs.check(config)
    config.sample.sampler = "heun"
    configs.check(config)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *((key, "0") for key in configs.POSITIVE),
        *((key, "-1") for key in ("total_steps", "data.workers", "optim.warmup_steps", "optim.weight_decay", "seed")),
        *(("ema.decay", text) for text in ("1.1", "-0.1", "nan")),
        *(("optim.lr", text) for text in ("nan", "inf", "-1e-4")),
        *(("optim.b1", "1"), ("optim.b2", "-0.1"), ("optim.eps", "0"), ("optim.clip_norm", "0")),
        *(("model.label_dropout", "2"), ("data.max_bad_rate", "1.5"), ("diffusion.snr_gamma", "0")),
        *((f"model.{field}", "0") for field in ("patch_size", "width", "depth", "heads", "mlp_ratio")),
        ("sample.guidance", "nan"),
    ],
)
def test_a_value_that_cannot_work_is_named(key, text):
    config = having(key)
    configs.override(config, key, text)
    with pytest.raises(ValueError) as error:
        configs.check(config)
    assert f"{key}=" in _line(error)


def test_only_openmoji_has_splits():
    config = configs.default()
    config.data.update(name="imagefolder", path="somewhere", split="train")
    with pytest.raises(ValueError, match=r"data\.split='train'.*'imagefolder'"):
        configs.check(config)


def test_the_task_is_the_config_files():
    with pytest.raises(ValueError, match="task is set by the config file"):
        configs.override(configs.default(), "task", "class_to_image")
    with pytest.raises(ValueError, match=r"task='class_to_imag' is unknown \(did you mean 'class_to_image'"):
        configs.default("class_to_imag")


@pytest.mark.parametrize("name", ["captions", "imagefolder", "tfds", "latents"])
def test_a_source_of_files_needs_a_path(name):
    config = configs.default()
    config.data.name = name
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        configs.check(config)


@pytest.mark.parametrize(
    ("batch", "accumulate", "devices", "near"),
    [(10, 1, 8, "8 and 16"), (3, 1, 8, "are 8"), (100, 3, 8, "96 and 120"), (7, 2, 1, "6 and 8"), (1, 4, 1, "4")],
)
def test_an_indivisible_batch_names_the_nearest_that_divide(batch, accumulate, devices, near):
    with pytest.raises(ValueError) as error:
        configs.check_batch(batch, accumulate, devices)
    assert f"batch_size={batch}" in _line(error) and _line(error).endswith(near)
    for size in (devices * accumulate, 5 * devices * accumulate):
        configs.check_batch(size, accumulate, devices)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_each_config_is_sound_and_says_how_it_is_run(path):
    config = configs.load_file(str(path))
    if config.data.name != "openmoji":
        config.data.path = "somewhere"
    configs.check(config)
    assert config.task != "class_to_image" or config.model.name in list_models()
    assert set(configs.flat(config)) == set(configs.flat(configs.default(config.task)))
    docstring = runpy.run_path(str(path))["__doc__"]
    assert f"python launch.py --config configs/{path.name}" in docstring and "arXiv" in docstring
    again = configs.from_dict(json.loads(json.dumps(config.to_dict())))
    assert configs.flat(again) == configs.flat(config)


def test_from_dict_refuses_an_unknown_key():
    with pytest.raises(ValueError, match=r"optim\.lrr.*did you mean 'optim\.lr'"):
        configs.from_dict({"optim": {"lrr": 1.0}})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "get_config"),
        ("def get_config(:", "SyntaxError"),
        (
            "from jdiff.config import default\ndef get_config():\n    c = default()\n    c.optim.lrr = 1\n    return c",
            "lrr",
        ),
        (
            "from jdiff.config import default\ndef get_config():\n    c = default()\n    c.bach_size = 1\n    return c",
            "bach",
        ),
        (
            "from jdiff.config import default\ndef get_config():\n    c = default()\n    c.model.update(widht=1)\n"
            "    return c",
            "widht",
        ),
        (
            "from jdiff.config import default\ndef get_config():\n    c = default()\n    c.optim.lr = 'x'\n    return c",
            "lr",
        ),
        ("def get_config():\n    return 3", "get_config"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(tmp_path, body, said):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(ValueError) as error:
        configs.load_file(str(path))
    assert "mine.py" in _line(error) and said in _line(error)


def test_a_missing_config_file_names_the_nearest():
    with pytest.raises(ValueError, match=r"no such file.*did you mean .*dit_s2\.py"):
        configs.load_file(str(ROOT / "configs" / "dit_s3.py"))
