"""InceptionV3 equals a PyTorch one written from the paper's tables and pytorch-fid's notes, on the same random weights."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jdiff import convert
from jdiff.convert.rows import ConversionError
from jdiff.models.inception import Inception

WIDTHS_A, WIDTHS_C = {"5b": 32, "5c": 64, "5d": 64}, {"6b": 128, "6c": 160, "6d": 160, "6e": 192}


class Peer:
    """Runs it, and on the first run makes random weights for the names that it meets."""

    def __init__(self):
        self.arrays, self.generator = {}, torch.Generator().manual_seed(0)

    def _random(self, name, shape, scale=1.0, shift=0.0):
        if name not in self.arrays:
            self.arrays[name] = torch.randn(shape, generator=self.generator) * scale + shift
        return self.arrays[name]

    def conv(self, name, x, width, kernel, stride=1, padding=0):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        fan_in = x.shape[1] * kernel[0] * kernel[1]
        y = F.conv2d(
            x,
            self._random(f"{name}.conv.weight", (width, x.shape[1], *kernel), (2 / fan_in) ** 0.5),
            stride=stride,
            padding=padding,
        )
        bn = [
            self._random(f"{name}.bn.running_mean", (width,), 0.1),
            self._random(f"{name}.bn.running_var", (width,), 0.1, 1.0).abs(),
            self._random(f"{name}.bn.weight", (width,), 0.1, 1.0),
            self._random(f"{name}.bn.bias", (width,), 0.1),
        ]
        self.arrays[f"{name}.bn.running_var"] = bn[1]
        return F.batch_norm(y, *bn, training=False, eps=0.001).relu()

    def a(self, n, x, pooled):
        n = f"Mixed_{n}."
        one = self.conv(n + "branch1x1", x, 64, 1)
        five = self.conv(n + "branch5x5_2", self.conv(n + "branch5x5_1", x, 48, 1), 64, 5, padding=2)
        three = self.conv(n + "branch3x3dbl_1", x, 64, 1)
        three = self.conv(n + "branch3x3dbl_2", three, 96, 3, padding=1)
        three = self.conv(n + "branch3x3dbl_3", three, 96, 3, padding=1)
        return torch.cat([one, five, three, self.conv(n + "branch_pool", mean(x), pooled, 1)], 1)

    def b(self, x):
        n = "Mixed_6a."
        three = self.conv(n + "branch3x3", x, 384, 3, stride=2)
        twice = self.conv(n + "branch3x3dbl_1", x, 64, 1)
        twice = self.conv(n + "branch3x3dbl_2", twice, 96, 3, padding=1)
        twice = self.conv(n + "branch3x3dbl_3", twice, 96, 3, stride=2)
        return torch.cat([three, twice, F.max_pool2d(x, 3, 2)], 1)

    def c(self, n, x, width):
        n = f"Mixed_{n}."
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        one = self.conv(n + "branch1x1", x, 192, 1)
        seven = self.conv(n + "branch7x7_1", x, width, 1)
        seven = self.conv(n + "branch7x7_3", self.conv(n + "branch7x7_2", seven, width, **row), 192, **column)
        twice = self.conv(n + "branch7x7dbl_1", x, width, 1)
        twice = self.conv(n + "branch7x7dbl_2", twice, width, **column)
        twice = self.conv(n + "branch7x7dbl_3", twice, width, **row)
        twice = self.conv(n + "branch7x7dbl_4", twice, width, **column)
        twice = self.conv(n + "branch7x7dbl_5", twice, 192, **row)
        return torch.cat([one, seven, twice, self.conv(n + "branch_pool", mean(x), 192, 1)], 1)

    def d(self, x):
        n = "Mixed_7a."
        three = self.conv(n + "branch3x3_2", self.conv(n + "branch3x3_1", x, 192, 1), 320, 3, stride=2)
        seven = self.conv(n + "branch7x7x3_1", x, 192, 1)
        seven = self.conv(n + "branch7x7x3_2", seven, 192, (1, 7), padding=(0, 3))
        seven = self.conv(n + "branch7x7x3_3", seven, 192, (7, 1), padding=(3, 0))
        return torch.cat([three, self.conv(n + "branch7x7x3_4", seven, 192, 3, stride=2), F.max_pool2d(x, 3, 2)], 1)

    def e(self, n, x, pooled):
        n = f"Mixed_{n}."
        parts = [self.conv(n + "branch1x1", x, 320, 1)]
        three = self.conv(n + "branch3x3_1", x, 384, 1)
        twice = self.conv(n + "branch3x3dbl_2", self.conv(n + "branch3x3dbl_1", x, 448, 1), 384, 3, padding=1)
        for stem, z in (("branch3x3_2", three), ("branch3x3dbl_3", twice)):
            parts.append(self.conv(f"{n}{stem}a", z, 384, (1, 3), padding=(0, 1)))
            parts.append(self.conv(f"{n}{stem}b", z, 384, (3, 1), padding=(1, 0)))
        return torch.cat([*parts, self.conv(n + "branch_pool", pooled, 192, 1)], 1)

    def __call__(self, x):
        x = self.conv("Conv2d_1a_3x3", x, 32, 3, stride=2)
        x = self.conv("Conv2d_2a_3x3", x, 32, 3)
        x = F.max_pool2d(self.conv("Conv2d_2b_3x3", x, 64, 3, padding=1), 3, 2)
        x = self.conv("Conv2d_4a_3x3", self.conv("Conv2d_3b_1x1", x, 80, 1), 192, 3)
        x = F.max_pool2d(x, 3, 2)
        for n, pooled in WIDTHS_A.items():
            x = self.a(n, x, pooled)
        x = self.b(x)
        for n, width in WIDTHS_C.items():
            x = self.c(n, x, width)
            if n == "6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.d(x)
        x = self.e("7b", x, mean(x))
        x = self.e("7c", x, F.max_pool2d(x, 3, 1, 1))
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self._random("fc.weight", (1008, 2048), 2048**-0.5).T


def mean(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@pytest.fixture(scope="module")
def peer():
    """(the peer, its input, its outputs)."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 299, 299) * 2 - 1
    peer = Peer()
    with torch.inference_mode():
        return peer, x, peer(x)


def state(peer):
    """As the public file has it: pytorch-fid's model has a bias of the classes, and counts of the batches."""
    arrays = {name: value.numpy() for name, value in peer.arrays.items()}
    counts = {f"{name[:-7]}.num_batches_tracked": np.array(0) for name in arrays if name.endswith(".bn.weight")}
    return arrays | {"fc.bias": np.zeros(1008, np.float32)} | counts


def test_inception_equals_pytorchs(peer):
    module = Inception()
    params = convert.from_torch(module, state(peer[0]))
    found = jax.jit(module.apply)({"params": params}, peer[1].permute(0, 2, 3, 1).numpy())
    for name, mine, theirs in zip(found._fields, found, peer[2], strict=True):
        assert mine.shape == theirs.shape and float(theirs.std()) > 0.01, name
        np.testing.assert_allclose(mine, theirs, atol=1e-4, err_msg=name)


def test_every_key_of_the_public_file_is_mapped(peer):
    arrays = state(peer[0])
    assert len([name for name in arrays if "num_batches" not in name]) == 94 * 5 + 2
    again = convert.to_torch(Inception(), convert.from_torch(Inception(), arrays), "torchvision")
    left = {name for name in arrays if name not in again}
    assert left == {name for name in arrays if name.endswith("num_batches_tracked")} | {"fc.bias"}
    assert all(np.array_equal(arrays[name], again[name]) for name in again)
    lacking = {name: value for name, value in arrays.items() if name != "Mixed_6d.branch7x7_2.bn.running_var"}
    with pytest.raises(ConversionError, match=r"missing: Mixed_6d\.branch7x7_2\.bn\.running_var"):
        convert.from_torch(Inception(), lacking)
    with pytest.raises(ConversionError, match=r"unexpected: Mixed_6d\.branch7x7_9\.conv\.weight"):
        convert.from_torch(Inception(), arrays | {"Mixed_6d.branch7x7_9.conv.weight": arrays["fc.weight"]})


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"299x299 in 3 channels, found \(256, 256, 3\)"):
        Inception().init(jax.random.key(0), np.zeros((1, 256, 256, 3), np.float32))
