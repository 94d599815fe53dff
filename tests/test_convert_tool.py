"""tools/convert.py as users run it: without PyTorch, from and to a small stand-in for the Hugging Face hub."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jdiff import convert, models
from jdiff.convert import bundle, dit, engine, export, torchfile

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "convert.py"
WITHOUT_TORCH = """
import runpy, sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "peft", "accelerate"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*args, env=None, code=0):
    """The tool in a process where PyTorch and its libraries cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(TOOL), *map(str, args)]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def small(name, seed=0):
    """(module, random params) of a small model."""
    import jax

    module = {
        "dit": lambda: models.create("DiT-S/2", image_size=8, num_classes=5, width=48, depth=2, heads=3),
        "vae": lambda: models.create("sd15/vae", block_out_channels=(32, 64), layers_per_block=1),
    }[name]()
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), engine.shapes(module))
    if name == "dit":
        params["pos_embed"] = dit.derived(module, "pos_embed")
    return module, params


@pytest.fixture
def files(tmp_path):
    """A DiT's .pt and a VAE's folder."""
    export.write(bundle.from_models({"dit": small("dit")}), tmp_path / "dit.pt", "dit")
    export.write(bundle.from_models({"vae": small("vae")}), tmp_path / "vae", "diffusers")
    return tmp_path


def test_every_format_without_torch(files):
    said = run(files / "dit.pt", files / "a", "--to", "diffusers")
    assert "DiT" in said and "32 of 32 arrays" in said and "read back and compared" in said
    run(files / "a", files / "b.safetensors", "--to", "safetensors")
    run(files / "b.safetensors", files / "c.pt", "--to", "dit")
    found, expected = torchfile.read(files / "c.pt"), torchfile.read(files / "dit.pt")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].tobytes() == value.tobytes()
    run(files / "vae", files / "vae.ckpt", "--to", "compvis")
    run(files / "vae.ckpt", files / "again", "--to", "diffusers")
    name = "diffusion_pytorch_model.safetensors"
    assert (files / "again" / name).read_bytes() == (files / "vae" / name).read_bytes()
    said = run(files / "vae", files / "half", "--dtype", "bf16")
    assert "as bf16" in said
    digest = hashlib.sha256((files / "half" / name).read_bytes()).hexdigest()
    assert digest in said and digest in (files / "half" / "README.md").read_text()


def test_mistakes_are_one_line(files):
    for args, message in (
        ((files / "vae", files / "dit.pt"), "exists"),
        ((files / "nothing", files / "x"), "does not exist"),
        ((files / "vae", files / "x", "--to", "dit"), "the dit format holds a DiT"),
    ):
        *_, said = run(*args, code=1).splitlines()
        assert message in said and said.startswith("error:")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as fetching and uploading takes. `server.files`: repo -> name -> bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self):
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.seen.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            repo = self.server.files.get(match.group(1))
            if repo is None:
                return self.missing()
            if match.group(2) == "tree":
                return self.answer([self.entry(name, content) for name, content in repo.items()])
            siblings = [{"rfilename": name} for name in repo]
            return self.answer({"id": match.group(1), "sha": "0" * 40, "siblings": siblings, "private": False})
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            content = self.server.files.get(match.group(1), {}).get(match.group(3))
            if content is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            etag = self.server.lies.get(match.group(3), self.etag(match.group(3), content))
            headers = {"X_Repo_Commit": "0" * 40, "ETag": f'"{etag}"', "X_Linked_Size": str(len(content))}
            if len(etag) == 64:
                headers["X_Linked_Etag"] = f'"{etag}"'
            return self.answer(content, **headers)
        return self.missing()

    def etag(self, name, content):
        if name.endswith(".safetensors"):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, name, content):
        entry = {"type": "file", "path": name, "size": len(content), "oid": self.etag(name, content)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.etag(name, content), "size": len(content), "pointerSize": 100}
        return entry

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.body()
        self.server.seen.append(f"POST {path}")
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": "1"})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith((".safetensors", ".pt")) else "regular" for name in names]
            entries = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            return self.answer({"files": entries})
        if path.endswith(".git/info/lfs/objects/batch"):
            host = f"http://{self.headers['Host']}/upload"
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{host}/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            repo = self.server.files[match.group(1)]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repo[value["path"]] = self.server.uploads[value["oid"]]
            address = f"http://{self.headers['Host']}/{match.group(1)}/commit/{'1' * 40}"
            return self.answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.missing()

    def do_PUT(self):
        self.server.seen.append(f"PUT {self.path}")
        self.server.uploads[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer()


@pytest.fixture
def hub(tmp_path):
    """The server, and an environment in which huggingface_hub uses it and a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.lies, server.uploads, server.seen = {}, {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    yield server
    server.shutdown()
    server.server_close()


def put(server, repo, folder):
    server.files[repo] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_repository_is_fetched_checked_and_kept(files, hub):
    put(hub, "owner/vae", files / "vae")
    hub.files["owner/vae"] |= {"diffusion_pytorch_model.bin": b"never asked for", "other.ckpt": b"nor this"}
    run("owner/vae", files / "out", env=hub.env)
    name = "diffusion_pytorch_model.safetensors"
    assert (files / "out" / name).read_bytes() == (files / "vae" / name).read_bytes()
    assert not any(".bin" in line or ".ckpt" in line for line in hub.seen)
    # offline, from the cache
    hub.shutdown()
    run("owner/vae", files / "out2", env={**hub.env, "HF_HUB_OFFLINE": "1"})
    said = run("owner/other", files / "out3", env={**hub.env, "HF_HUB_OFFLINE": "1"}, code=1)
    assert "not in the hub's cache" in said


def test_one_file_of_a_repository(files, hub):
    hub.files["owner/dit"] = {"sub/dit.pt": (files / "dit.pt").read_bytes()}
    run("owner/dit/sub/dit.pt", files / "out.pt", env=hub.env)
    assert (files / "out.pt").read_bytes() == (files / "dit.pt").read_bytes()


def test_a_wrong_hash_is_refused(files, hub):
    put(hub, "owner/vae", files / "vae")
    hub.lies["diffusion_pytorch_model.safetensors"] = "ab" * 32
    said = run("owner/vae", files / "out", env=hub.env, code=1)
    assert "abababab" in said and "fetch it again" in said and not (files / "out").exists()


def test_a_repository_that_is_not_there(files, hub):
    assert "owner/none" in run("owner/none", files / "out", env=hub.env, code=1)


@pytest.mark.parametrize("source", ["vae", "dit.pt"])
def test_an_export_is_uploaded_with_its_card(source, files, hub):
    out = files / f"out{Path(source).suffix}"
    said = run(files / source, out, "--push", "owner/new", env=hub.env)
    assert "uploaded to" in said
    there = hub.files["owner/new"]
    assert b"library_name" in there["README.md"] and b"sha256" in there["README.md"]
    if source == "vae":
        (files / "seen.safetensors").write_bytes(there["diffusion_pytorch_model.safetensors"])
        assert load_file(files / "seen.safetensors")
    else:
        assert there["out.pt"] == out.read_bytes()
    said = run(files / source, files / "again", "--to", "diffusers", "--push", "owner/new",
               env={**hub.env, "HF_TOKEN": "hf_wrong"}, code=1)  # fmt: skip
    assert "was written, but not uploaded" in said


def test_what_is_fetched_of_a_repository():
    names = [
        *("model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
        *("text_encoder/config.json", "text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack"),
        *("vae/diffusion_pytorch_model-00001-of-00002.bin", "vae/diffusion_pytorch_model-00002-of-00002.bin"),
        "vae/diffusion_pytorch_model.bin.index.json",
    ]
    from jdiff.convert import hub

    chosen = set(hub.choose(names))
    weights = {name for name in chosen if name.endswith((".safetensors", ".bin", ".ckpt", ".msgpack"))}
    assert weights == {
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/pytorch_model.bin",
        *(name for name in names if "-of-" in name),
    }
    assert {"model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.bin.index.json"} <= chosen
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" in hub.choose(names, "raw")


def test_a_path_is_never_taken_for_a_repository(tmp_path):
    with pytest.raises(convert.ConversionError, match="does not exist"):
        bundle.read(tmp_path / "a" / "b")
    for name in ("../evil/name", "a/../b", "no slash", "/etc/nothing"):
        with pytest.raises(convert.ConversionError, match="does not exist"):
            bundle.read(name)
