"""Training the autoencoder: its losses equal an independent PyTorch in float64, and a run goes on as if uninterrupted."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

import jdiff
from jdiff import checkpoint, train, tree, weights
from jdiff import config as configs
from jdiff.evaluate.reconstruction import psnr, ssim
from jdiff.models import lpips
from jdiff.models.discriminator import PatchDiscriminator
from jdiff.models.vae import Posterior
from jdiff.report import SPEED
from jdiff.tasks import mean_gradient
from jdiff.tasks.autoencoder import autoencoder_gradient

GAN = {"start": 10, "weight": 0.5}


@pytest.fixture
def wide():
    """Both sides in float64."""
    with jax.enable_x64(True):
        yield


def randomized(params, seed=0, scale=0.1):
    """A float64 tree of the same shapes, around zero; vectors around one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray((x.ndim == 1) + scale * rng.normal(size=x.shape), jnp.float64), params)


def t(x, grad=False):
    """A torch tensor of the same numbers."""
    return torch.tensor(np.array(x), requires_grad=grad)


def nchw(x):
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2).contiguous()


def torch_conv(p, x, stride=1, padding=1):
    """A convolution with our kernel (torch leaves)."""
    return F.conv2d(x, p["kernel"].permute(3, 2, 0, 1), p.get("bias"), stride, padding)


def torch_discriminator(p, x):
    """taming-transformers' NLayerDiscriminator with three layers, BatchNorm in training."""
    for i, stride in enumerate((2, 2, 2, 1)):
        x = torch_conv(p[f"conv_{i}"], x, stride)
        if i:
            x = F.batch_norm(x, None, None, p[f"norm_{i}"]["scale"], p[f"norm_{i}"]["bias"], training=True)
        x = F.leaky_relu(x, 0.2)
    return torch_conv(p["conv_out"], x)


def torch_lpips(p, x, y):
    """lpips' VGG16 distance, (B,)."""
    shift, scale = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (lpips.SHIFT, lpips.SCALE))
    x, y = (x - shift) / scale, (y - shift) / scale
    total = 0.0
    for stage, numbers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
        if stage:
            x, y = F.max_pool2d(x, 2, 2), F.max_pool2d(y, 2, 2)
        for n in numbers:
            x, y = (F.relu(torch_conv(p[f"features_{n}"], z)) for z in (x, y))
        a, b = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        total = total + F.conv2d((a - b) ** 2, p[f"lin{stage}"].reshape(1, -1, 1, 1)).mean((1, 2, 3))
    return total


class Toy:
    """An autoencoder of three convolutions whose last kernel stands where AutoencoderKL's does."""

    def params(self):
        shapes = {"encoder": {"kernel": (3, 3, 3, 4)}, "decoder": {"conv_in": {"kernel": (3, 3, 2, 5)}}}
        shapes["decoder"]["conv_out"] = {"kernel": (3, 3, 5, 3)}
        leaves = jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
        return randomized(leaves, seed=3, scale=0.3)

    def apply(self, variables, x, method):
        p = variables["params"]
        if method == "encode":
            return Posterior(*jnp.split(weights.conv(x, p["encoder"]["kernel"], (1, 1), "SAME"), 2, -1))
        h = jnp.tanh(weights.conv(x, p["decoder"]["conv_in"]["kernel"], (1, 1), "SAME"))
        return weights.conv(h, p["decoder"]["conv_out"]["kernel"], (1, 1), "SAME")

    def torch(self, p, x, noise):
        mean, logvar = torch_conv(p["encoder"], x).chunk(2, 1)
        z = mean + torch.exp(0.5 * logvar) * noise
        y = torch_conv(p["decoder"]["conv_out"], torch.tanh(torch_conv(p["decoder"]["conv_in"], z)))
        return y, 0.5 * torch.sum(mean**2 + logvar.exp() - 1 - logvar, (1, 2, 3))


def close(found, expected, name=""):
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=1e-8, rtol=0, err_msg=name)


def test_the_discriminator_equals_pytorchs(wide):
    disc = PatchDiscriminator(8, jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40, 33, 3)))
    params = randomized(jax.eval_shape(disc.init, jax.random.key(0), x)["params"])
    value, grads = jax.jit(jax.value_and_grad(lambda p: (disc.apply({"params": p}, x) ** 2).sum()))(params)
    peer = jax.tree.map(lambda v: t(v, grad=True), params)
    expected = torch_discriminator(peer, nchw(x))
    assert jax.eval_shape(disc.apply, {"params": params}, x).shape == (3, *expected.shape[2:], 1)
    (expected**2).sum().backward()
    close(value, (expected**2).sum())
    for path, leaf in tree.flatten(grads).items():
        close(leaf, tree.flatten(peer)[path].grad, path)
    assert tree.count(jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), x)) == 2_765_633
    with pytest.raises(ValueError, match="24x24"):
        disc.init(jax.random.key(0), x[:, :16])


def torch_names(params):
    """LPIPS' parameters under torchvision's and lpips' names."""
    found = {}
    for name, value in params.items():
        if name.startswith("lin"):
            found[f"{name}.model.1.weight"] = np.asarray(value, np.float32).reshape(1, -1, 1, 1)
        else:
            number = name.removeprefix("features_")
            kernel = np.asarray(value["kernel"], np.float32).transpose(3, 2, 0, 1)
            found |= {f"features.{number}.weight": np.ascontiguousarray(kernel)}
            found[f"features.{number}.bias"] = np.asarray(value["bias"], np.float32)
    return found


@pytest.fixture(scope="module")
def lpips_params():
    """Random weights of LPIPS under which activations neither vanish nor explode."""
    x = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), x, x)["params"]
    rng = np.random.default_rng(0)
    std = lambda s: np.sqrt(2 / np.prod(s.shape[:-1])) if len(s.shape) == 4 else 0.1  # noqa: E731
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) * std(s)).astype(np.float32), shapes)


@pytest.mark.runs
def test_lpips_equals_pytorchs(wide, lpips_params):
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.uniform(-1, 1, (2, 16, 24, 3))) for _ in range(2))
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), lpips_params)
    module = lpips.LPIPS(jnp.float64)
    distance = lambda x: module.apply({"params": params}, x, y)  # noqa: E731
    peer = nchw(x).requires_grad_()
    expected = torch_lpips(jax.tree.map(t, params), peer, nchw(y))
    expected.sum().backward()
    close(distance(x), expected)
    close(jax.grad(lambda x: distance(x).sum())(x), peer.grad.permute(0, 2, 3, 1))
    assert float(jnp.abs(module.apply({"params": params}, y, y)).max()) == 0
    assert np.isfinite(jax.grad(lambda x: module.apply({"params": params}, x, 0 * y).sum())(0 * x)).all()


def test_lpips_weights_by_their_pytorch_names(lpips_params):
    names = torch_names(lpips_params)
    assert tree.differences(lpips_params, lpips.from_torch(names)) == []
    for a, b in zip(jax.tree.leaves(lpips_params), jax.tree.leaves(lpips.from_torch(names)), strict=True):
        np.testing.assert_array_equal(a, b)
    package = {"scaling_layer.shift": np.zeros(3), "lins.0.model.1.weight": names["lin0.model.1.weight"]}
    for name, value in names.items():
        package[name.replace("features.", "net.slice1.")] = value
    assert tree.differences(lpips_params, lpips.from_torch(package)) == []
    for change, said in (
        (lambda n: n.pop("features.7.bias"), r"features\.7\.bias is missing"),
        (lambda n: n.update({"features.7.extra": np.zeros(1)}), r"features\.7\.extra is unknown"),
        (lambda n: n.update({"lin2.model.1.weight": np.zeros((1, 3, 1, 1))}), r"lin2\.model\.1\.weight has shape"),
    ):
        changed = dict(names)
        change(changed)
        with pytest.raises(ValueError, match=said):
            lpips.from_torch(changed)


@pytest.mark.parametrize("step", [9, 10])
def test_gradients_equal_an_independent_computation(wide, lpips_params, step):
    """Generator, adaptive weight and discriminator, as contperceptual.py computes them, in PyTorch's float64."""
    rng, toy, disc, distance = (
        np.random.default_rng(2),
        Toy(),
        PatchDiscriminator(4, jnp.float64),
        lpips.LPIPS(jnp.float64),
    )
    image = jnp.asarray(rng.uniform(0, 255, (3, 24, 24, 3)))
    x = image / 127.5 - 1
    logvar = jnp.asarray(-0.7)
    params = {
        "vae": toy.params(),
        "disc": randomized(jax.eval_shape(disc.init, jax.random.key(0), x)["params"]),
        "logvar": logvar,
    }
    frozen = {"lpips": jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), lpips_params)}
    halves = tree.set_apart({**params, **frozen}, r"lpips/.*")
    keys = jax.random.split(jax.random.key(5), 3)
    kl_weight, lpips_weight, edge_weight = 1e-2, 0.8, 0.3
    gradient = autoencoder_gradient(
        toy, disc, distance, kl_weight=kl_weight, lpips_weight=lpips_weight, edge_weight=edge_weight, gan=GAN
    )
    grads, found = jax.jit(gradient)(*halves, {"image": image}, keys, jnp.int32(step))

    noise = jax.vmap(lambda key: jax.random.normal(key, (24, 24, 2), jnp.float64))(keys)
    peer = jax.tree.map(lambda v: t(v, grad=True), params)
    real = nchw(x)
    y, kl = toy.torch(peer["vae"], real, nchw(noise))
    p = lpips_weight * torch_lpips(jax.tree.map(t, frozen["lpips"]), real, y)
    edges = torch.zeros(3, dtype=torch.float64)
    z = real - y
    for _ in range(3):
        edges = edges + (z[:, :, 1:] - z[:, :, :-1]).abs().mean((1, 2, 3)) / 3
        edges = edges + (z[..., 1:] - z[..., :-1]).abs().mean((1, 2, 3)) / 3
        z = F.avg_pool2d(z, 2)
    p = p + edge_weight * edges
    nll = ((real - y).abs() + p[:, None, None, None]) / torch.exp(peer["logvar"]) + peer["logvar"]
    nll = nll.sum() / 3
    g_loss = -torch_discriminator(peer["disc"], y).mean()
    last = peer["vae"]["decoder"]["conv_out"]["kernel"]
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (nll, g_loss)]
    weight = (0.5 * torch.clamp(norms[0] / (norms[1] + 1e-4), 0, 1e4)).detach() * (step >= 10)
    loss = nll + kl_weight * kl.sum() / 3 + weight * g_loss
    logits = torch_discriminator(peer["disc"], real), torch_discriminator(peer["disc"], y.detach())
    d_loss = 0.5 * (F.relu(1 - logits[0]).mean() + F.relu(1 + logits[1]).mean()) * (step >= 10)

    assert set(found) == {"loss", "nll", "l1", "lpips", "edge", "kl", "logvar", "g_loss", "d_loss", "d_weight"}
    assert all(value.shape == (3,) for value in found.values())
    for name, value in {"loss": loss, "nll": nll, "g_loss": g_loss, "d_loss": d_loss, "d_weight": weight}.items():
        close(found[name].mean(), value, name)
    close(found["edge"], edges)
    names = ("logvar", "vae")
    expected = torch.autograd.grad(loss, jax.tree.leaves({name: peer[name] for name in names}))
    found_grads = tree.flatten({name: grads[name] for name in names})
    for (path, leaf), value in zip(found_grads.items(), expected, strict=True):
        close(leaf, value, path)
    expected = torch.autograd.grad(d_loss, jax.tree.leaves(peer["disc"]))
    for (path, leaf), value in zip(tree.flatten(grads["disc"]).items(), expected, strict=True):
        close(leaf, value, path)
    assert jax.tree.structure(grads) == jax.tree.structure(halves[0])
    assert (float(found["d_weight"][0]) > 0) == (step >= 10)


def plain_ssim(x, y):
    """SSIM of one channel, window by window."""
    tap = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(tap, tap) / np.outer(tap, tap).sum()
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
            scores.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return np.mean(scores)


def test_psnr_and_ssim_equal_plain_numpy(wide):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (2, 14, 17, 3))
    y = np.clip(x + rng.normal(size=x.shape) * np.array([0.05, 0.2])[:, None, None, None], 0, 1)
    expected = [[10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(x, y, strict=True)]]
    expected.append([np.mean([plain_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(x, y, strict=True)])
    for function, value in zip((psnr, ssim), expected, strict=True):
        np.testing.assert_allclose(function(jnp.asarray(x), jnp.asarray(y)), value, atol=1e-9)
    assert psnr(x, x).tolist() == [100, 100]
    np.testing.assert_allclose(ssim(jnp.asarray(x), jnp.asarray(x)), 1, atol=1e-12)
    with pytest.raises(ValueError, match="11x11"):
        ssim(jnp.asarray(x[:, :8]), jnp.asarray(y[:, :8]))


def tiny(folder, **changes):
    """Keys of an autoencoder of a second on a folder of pictures."""
    return {
        **{"vae.block_out_channels": (8, 16), "vae.layers_per_block": 1, "vae.norm_num_groups": 4, "batch_size": 8},
        **{"gan.width": 4, "gan.start": 2, "data.image_size": 32, "data.name": "imagefolder", "data.split": "all"},
        **{"data.path": str(folder), "heldout.path": str(folder), "heldout.count": 10, "sample.count": 4},
        **{"total_steps": 6, "checkpoint_every": 3, "sample_every": 3, "log_every": 2, "log.tensorboard": False},
        **{"optim.schedule": "constant", **changes},
    }


def tiny_setup(folder, **changes):
    """What those keys make in this process."""
    config = configs.load_file("configs/vae_openmoji.py")
    config.update_from_flattened_dict(tiny(folder, **changes))
    return train.Setup(config)


def run(commands, folder, workdir, **changes):
    """Trains by the command line."""
    keys = [f"--config.{key}={value}" for key, value in tiny(folder, **changes).items()]
    result = commands.run("launch.py", "--config", "configs/vae_openmoji.py", "--workdir", workdir, *keys)
    assert result.returncode == 0, result.stderr


def outcome(workdir):
    """All that a run leaves, without the machine's speed."""
    meta = checkpoint.read_meta(workdir, 6)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        **{key: meta[key] for key in ("checksums", "window", "measures", "scaling_factor", "models")},
        "records": [{k: v for k, v in line.items() if k not in SPEED} for line in lines],
        "pictures": {p.name: p.read_bytes() for p in (workdir / "samples").glob("*.png")},
    }


@pytest.fixture(scope="module")
def whole(commands, image_folder, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("autoencoder") / "run"
    run(commands, image_folder, workdir)
    return workdir, outcome(workdir)


@pytest.mark.runs
def test_a_run_records_its_reconstructions(whole):
    workdir, found = whole
    assert [record["step"] for record in found["records"]] == [2, 3, 4, 6]
    for record in found["records"]:
        assert ("psnr" in record) == (record["step"] % 3 == 0)
        assert np.isfinite(list(record.values())).all() and "loss_quarter_1" not in record
    last = found["records"][-1]
    assert {k: last[k] for k in ("psnr", "ssim", "scaling_factor")} == found["measures"]
    assert 3 < last["psnr"] < 30 and -1 < last["ssim"] < 1 and last["d_loss"] > 0 and last["d_weight"] > 0
    assert found["records"][0]["d_weight"] == 0  # before gan.start
    with Image.open(workdir / "samples" / "step_00000006.png") as image:
        image.load()
        facts = json.loads(image.info["jdiff"])
        assert image.size == (4 * 66 + 2, 2 * 66 + 2)  # four originals above their reconstructions
    assert facts["psnr"] == last["psnr"] and facts["ssim"] == last["ssim"] and facts["step"] == 6
    assert (workdir / "report.html").read_text().count("data:image/png;base64,") == 3  # curves, two grids


def scored(commands, *arguments):
    """The line that a scoring adds."""
    file = Path(arguments[-1])
    done = commands.run("tools/evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text().splitlines()[-1])


@pytest.mark.runs
def test_the_tool_measures_reconstructions_as_the_run_does(whole, commands, image_folder, tmp_path):
    workdir, found = whole
    line = scored(
        commands,
        workdir,
        "--reference",
        image_folder,
        "--num",
        10,
        "--metrics",
        "psnr,ssim",
        "--json",
        tmp_path / "json",
    )
    # the tool's pictures are bytes, as they would be looked at
    assert line["psnr"][0] == pytest.approx(found["measures"]["psnr"], abs=0.01)
    assert line["ssim"][0] == pytest.approx(found["measures"]["ssim"], abs=1e-3)
    assert line["count"] == 10 and line["step"] == 6 and "network" not in line


@pytest.mark.runs
def test_the_tool_compares_pictures_one_by_one(lpips_params, commands, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    y = np.clip(x + rng.normal(size=x.shape) * np.linspace(5, 60, 5)[:, None, None, None], 0, 255).astype(np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=x)
    np.savez_compressed(tmp_path / "y.npz", arr_0=y)
    save_file(torch_names(lpips_params), tmp_path / "lpips.safetensors")
    a, b = x / 255, y / 255
    params = jax.tree.map(lambda v: t(v), jax.tree.map(np.float64, lpips_params))
    expected = {
        "psnr": -10 * np.log10(((a - b) ** 2).mean((1, 2, 3))),
        "ssim": [np.mean([plain_ssim(i[..., c], j[..., c]) for c in range(3)]) for i, j in zip(a, b, strict=True)],
        "lpips": torch_lpips(params, nchw(2 * b - 1), nchw(2 * a - 1)).numpy(),
    }
    metrics = ("--metrics", "psnr,ssim,lpips", "--lpips", tmp_path, "--json", tmp_path / "json")
    line = scored(commands, tmp_path / "y.npz", "--reference", tmp_path / "x.npz", *metrics)
    for name, values in expected.items():
        mean, error = np.mean(values), np.std(values, ddof=1) / 5**0.5
        np.testing.assert_allclose(line[name], [mean, mean - 1.96 * error, mean + 1.96 * error], rtol=1e-4)
    for name, pictures in (("x", x), ("y", y)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    folders = (tmp_path / "y", "--reference", tmp_path / "x", "--image-size", 32)
    again = scored(commands, *folders, *metrics)
    assert {k: again[k] for k in expected} == {k: line[k] for k in expected}
    (tmp_path / "y" / "3.png").rename(tmp_path / "y" / "33.png")
    for options, said in (
        (folders, "has 33 where"),
        ((tmp_path / "y.npz", "--reference", tmp_path / "y", "--image-size", 16), "as shape"),
        ((tmp_path / "y.npz",), "give a --reference of them"),
        ((tmp_path / "y.npz", "--reference", tmp_path / "x.npz", "--network", "a"), "not for psnr, ssim, lpips"),
    ):
        wrong = commands.run("tools/evaluate.py", *options, *metrics)
        assert wrong.returncode == 2 and said in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr


@pytest.mark.runs
def test_a_resumed_run_equals_an_uninterrupted_one(whole, commands, image_folder, tmp_path):
    run(commands, image_folder, tmp_path / "run", total_steps=3)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    run(commands, image_folder, tmp_path / "run")
    found = outcome(tmp_path / "run")
    for name, value in whole[1].items():
        assert found[name] == value, f"{name} differs"


@pytest.mark.slow
def test_the_loss_of_adapters_is_the_generators_before_its_adversary(image_folder):
    setup = tiny_setup(image_folder)
    full = setup.task.init(jax.random.key(0), {})
    batch = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))}
    keys = jax.random.split(jax.random.key(1), 8)
    grads, found = jax.jit(setup.task.gradient)(full, jax.tree.map(lambda _: None, full), batch, keys, jnp.int32(0))
    plain, losses = jax.jit(mean_gradient(setup.task.loss))(full, jax.tree.map(lambda _: None, full), batch, keys, 0)
    np.testing.assert_allclose(losses["loss"], found["loss"], rtol=1e-5)
    for path, leaf in tree.flatten(plain["vae"]).items():
        other = np.asarray(tree.flatten(grads["vae"])[path])
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5 * np.abs(other).max(), err_msg=path)


@pytest.mark.runs
def test_load_gives_the_autoencoder_and_its_scale(whole, image_folder):
    workdir, found = whole
    vae, params = jdiff.load(workdir)
    _, raw = jdiff.load(workdir, weights="raw")
    assert type(vae).__name__ == "AutoencoderKL" and vae.scaling_factor == found["scaling_factor"] != 1
    sums = tree.checksums({"ema_params": {"vae": params}, "params": {"vae": raw}})
    assert sums.items() <= found["checksums"].items()
    task = tiny_setup(image_folder).task
    x = jnp.asarray(task.heldout, jnp.float32) / 127.5 - 1
    encode = jax.jit(lambda params, x: vae.apply({"params": params}, x, method="encode"))
    z = encode(params, x).sample(jax.random.key(0))
    np.testing.assert_allclose(z.std() * vae.scaling_factor, 1, rtol=0.02)
    with pytest.raises(ValueError, match="autoencoder"):
        jdiff.pipeline(workdir)


def test_lpips_is_given_kept_and_never_trained(lpips_params, image_folder, tmp_path):
    save_file(torch_names(lpips_params), tmp_path / "lpips.safetensors")
    setup = tiny_setup(image_folder, **{"lpips.path": str(tmp_path)})
    state = setup.fresh_state()
    np.testing.assert_array_equal(state.frozen["lpips"]["features_14"]["kernel"], lpips_params["features_14"]["kernel"])
    assert not [p for p in tree.flatten(state.params) if p.startswith("lpips")]
    assert {p.split("/")[0] for p in tree.flatten(state.params)} == {"vae", "disc", "logvar"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.image_size": 33}, "data.image_size=33 must be a multiple of 2"),
        ({"data.image_size": 16}, "32 at least"),
        ({"vae.norm_num_groups": 3}, "norm_num_groups"),
        ({"gan.weight": -1.0}, "gan.weight"),
        ({"vae.block_out_channels": (8, 0)}, "vae.block_out_channels"),
    ],
)
def test_a_mistake_is_one_line(image_folder, changes, said):
    with pytest.raises(ValueError, match=said) as error:
        tiny_setup(image_folder, **changes)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_lpips_is_named(image_folder, tmp_path):
    (tmp_path / "vgg.pth").write_bytes(b"PK")
    setup = tiny_setup(image_folder, **{"lpips.path": str(tmp_path / "vgg.pth")})
    with pytest.raises(ValueError, match=r"lpips\.path=.*vgg\.pth") as error:
        setup.fresh_state()
    assert "\n" not in str(error.value)


def test_widths_are_given_by_comma():
    config = configs.default("autoencoder")
    configs.override(config, "vae.block_out_channels", "32,64, 96")
    assert config.vae.block_out_channels == (32, 64, 96)
    with pytest.raises(ValueError, match=r"vae\.block_out_channels='wide'"):
        configs.override(config, "vae.block_out_channels", "32,wide")
    again = configs.from_dict(json.loads(json.dumps(config.to_dict())))
    assert configs.flat(again) == configs.flat(config)
