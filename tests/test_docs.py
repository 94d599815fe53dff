"""Every command of the README and of docs/ runs, in their order, at a small size."""

import itertools
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_pictures, serving
from PIL import Image
from test_inception import Peer, state
from tiny_sd import make_clip, make_folder

PAGES = (
    *("docs/stable_diffusion.md", "docs/lora.md", "README.md", "docs/train.md", "docs/sample.md", "docs/scale.md"),
    *("docs/int8.md", "docs/evaluate.md", "docs/app.md", "docs/convert.md"),
)
"""What one makes the next ones take: a Stable Diffusion run, a LoRA, pictures of classes."""
TWO_STEPS = ("--config.total_steps=2", "--config.sample.steps=2", "--config.log.tensorboard=false")
LITTLE_SD = ("--config.batch_size=8", "--config.data.workers=0", *TWO_STEPS)
SMALL_CONFIGS = {
    "dit_s2": (*TINY, "--config.model.width=64", "--config.distill.count=8", *TWO_STEPS),
    "classifier_openmoji": (
        *("--config.data.image_size=16", "--config.model.widths=8,16", "--config.batch_size=16"),
        *("--config.total_steps=4", "--config.log.tensorboard=false"),
    ),
    "dit_xl2_imagenet256": ("--plan", "h100x8", *TINY, "--config.mesh.fsdp=8", "--config.data.path=8x8x4:10"),
    "vae_openmoji": (
        *("--config.vae.block_out_channels=8,16,16", "--config.vae.norm_num_groups=4", "--config.batch_size=8"),
        *("--config.gan.width=4", "--config.gan.start=2", "--config.heldout.count=8", "--config.total_steps=4"),
        *("--config.log.tensorboard=false", "--config.data.image_size=32"),
    ),
    "sd_openmoji": (*LITTLE_SD, "--config.unet.block_out_channels=32,32,32", "--config.text.width=32"),
    "sd_lora_openmoji": LITTLE_SD,
    "sd15": (*LITTLE_SD, "--config.data.image_size=16", "--config.buckets.use=false"),
    "sd15_lora": (*LITTLE_SD, "--config.data.image_size=16", "--config.buckets.use=false"),
}
SMALL = {
    "tools/evaluate.py": ("--num", "6", "--resamples", "2"),
    "tools/lora.py extract": ("--rank", "2"),
    "tools/lora.py resize": ("--rank", "2", "--base", "BASE"),
    "tools/quantize.py report": ("--num", "2", "--steps", "2"),
    "tools/quantize.py runs/a": ("--steps", "2"),
    "tools/cache_latents.py": ("--image-size", "32"),
}


def commands_of(page):
    """The page's commands in fenced blocks, as arguments; lines continued by a backslash are one, comments left out."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    shell = [block.replace("\\\n", " ").splitlines() for language, block in blocks if not language]
    lines = itertools.chain.from_iterable(shell)
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def small(script, arguments):
    """Arguments that make a command one of seconds; they come last, and so count."""
    if script == "tools/launch/local.py":
        _, inner, *more = arguments[arguments.index("--") :]
        return small(inner, more)
    if script == "launch.py":
        name = arguments[arguments.index("--config") + 1]
        return SMALL_CONFIGS[name.removeprefix("configs/").removesuffix(".py")]
    if script == "tools/sample.py":
        more = ("--num", "8") if "--num" in arguments else ()
        return (*more, "--steps", "2")
    return SMALL.get(f"{script} {arguments[0]}", SMALL.get(script, ()))


def place(folder):
    """What the docs' commands take for granted, in a folder of its own."""
    for name in ("configs", "launch.py", "tools"):
        (folder / name).symlink_to(ROOT / name)
    base = make_folder(folder / "made")
    for name in ("BASE", "stable-diffusion-v1-5", "PATH", "SRC"):
        (folder / name).symlink_to(base)
    shutil.copytree(base, folder / "TUNED")
    weights = next((folder / "TUNED" / "unet").glob("*.safetensors"))
    _shift(weights)
    make_clip(folder / "clip-vit-base-patch32")
    for name in ("FOLDER", "PICTURES", "OTHERS"):
        make_pictures(folder / name, each=12)
    pictures = sorted((folder / "PICTURES").rglob("*.png"))
    rows = [{"file_name": str(p.relative_to(folder / "PICTURES")), "text": "a red fox"} for p in pictures]
    (folder / "PICTURES" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    peer = Peer()
    with torch.inference_mode():
        peer(torch.rand(1, 3, 299, 299))
    arrays = {name: torch.tensor(np.asarray(value)) for name, value in state(peer).items()}
    torch.save(arrays, folder / "pt_inception-2015-12-05-6726825d.pth")
    rng = np.random.default_rng(0)
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    pictures = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=pictures, **moments)


def _shift(path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    save_file({k: v + 0.01 * rng.normal(size=v.shape).astype(v.dtype) for k, v in load_file(path).items()}, path)


@pytest.mark.runs
def test_every_command_of_the_docs_runs(commands, tmp_path):
    place(tmp_path)
    count, failed = 0, []
    for page in PAGES:
        for _, script, *arguments in commands_of(page):
            count += 1
            if script == "tools/app.py":  # it runs until Ctrl-C
                with serving(commands, *arguments, cwd=tmp_path):
                    continue
            devices = 2 if any("fsdp" in argument for argument in arguments) else 1
            done = commands.run(script, *arguments, *small(script, arguments), cwd=tmp_path, devices=devices)
            if done.returncode:
                failed.append(f"{page}: {script} {shlex.join(arguments)}\n{done.stderr[-1000:]}")
    assert not failed, "\n".join(failed)
    assert count >= 40
    assert Image.open(tmp_path / "grid.png").width > 8 and (tmp_path / "adapted.png").exists()


def test_every_page_is_run():
    written = {str(p.relative_to(ROOT)) for p in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")}
    with_commands = {page for page in written if commands_of(page)}
    assert with_commands == set(PAGES)
