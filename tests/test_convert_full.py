"""Full sizes: DiT-XL/2 and Stable Diffusion 1.5 come back byte for byte, in bounded memory."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from jdiff import models
from jdiff.convert import dit, engine
from jdiff.convert.engine import Naming
from jdiff.convert.namings import PREFIXES, prefixed

TOOL = Path(__file__).parent.parent / "tools" / "convert.py"
# getrusage's maximum is inherited from the process that forks, so it is the kernel's mark of the process' own memory
MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)))
"""
pytestmark = pytest.mark.slow


def convert(*args, limit):
    """Runs the tool; its peak memory in bytes (mapped pages of the file counted) must be below `limit`, and seconds are shown."""
    done = subprocess.run([sys.executable, "-c", MEASURED, TOOL, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"peak (\d+)", done.stdout).group(1))
    print(done.stdout, f"peak {peak / 2**20:.0f} MiB")
    assert peak < limit


def random_state(parts, dtype=torch.float32):
    """Random tensors under the names of a format: (module name, naming) pairs."""
    state, rng = {}, np.random.default_rng(0)
    for name, naming in parts:
        module = models.create(name)
        shapes = {path: leaf.shape for path, leaf in engine.tree.flatten(engine.shapes(module)).items()}
        for entry in engine.plan(module, naming):
            for key, shape in zip(entry.names, entry.layout.shapes(shapes[entry.path]), strict=True):
                state[key] = torch.from_numpy(rng.random(shape, np.float32) - 0.5).to(dtype)
        if name.startswith("DiT"):
            state["pos_embed"] = torch.from_numpy(dit.derived(module, "pos_embed"))
    return state


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


def test_dit_xl_2(tmp_path):
    state = random_state([("DiT-XL/2", Naming("dit"))])
    size = sum(x.nbytes for x in state.values())
    assert size == 4 * 675_129_632
    torch.save(state, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "folder", "--to", "diffusers", limit=1.3 * size)
    convert(tmp_path / "folder", tmp_path / "back.pt", "--to", "dit", limit=1.3 * size)
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True, mmap=True), state)


def test_stable_diffusion_15(tmp_path):
    parts = [("sd15/unet", "UNet"), ("sd15/vae", "AutoencoderKL"), ("sd15/text", "CLIPText")]
    state = random_state(
        [(name, Naming("compvis", prefixed(PREFIXES[kind][0]))) for name, kind in parts], torch.float16
    )
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    size = sum(x.nbytes for x in state.values())
    torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
    convert(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors", "--to", "compvis", limit=1.3 * size)
    with safe_open(tmp_path / "sd.safetensors", "pt") as opened:
        assert_same({name: opened.get_tensor(name) for name in opened.keys()}, state)  # noqa: SIM118
    convert(tmp_path / "sd.safetensors", tmp_path / "back.ckpt", "--to", "compvis", limit=1.3 * size)
    assert_same(torch.load(tmp_path / "back.ckpt", weights_only=True, mmap=True)["state_dict"], state)
