"""The app as a stranger meets it: no file of the machine is given or written, limits hold for many, memory comes back."""

import os
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import serving

from jdiff import convert, models

pytest.importorskip("gradio_client")
pytestmark = pytest.mark.faults
MOST_GROWTH = 50 * 2**20
SETTINGS = {"labels": [0], "steps": 2, "guidance": 1.0, "count": 1}
SECRETS = (
    "/etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "../../../../etc/passwd",
    "/proc/self/environ",
    "file:///etc/passwd",
)


@pytest.fixture(scope="module")
def served(commands, tmp_path_factory):
    """(address, the folder that is the server's for temporary files)."""
    folder = tmp_path_factory.mktemp("served")
    model = models.create("DiT-S/2", image_size=8, num_classes=3, width=32, depth=2, heads=2)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    convert.write(convert.from_models({"dit": (model, params)}), folder / "dit.pt", "dit")
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        with serving(commands, folder / "dit.pt", "--max-waiting", 64) as address:
            yield address, folder / "tmp"


def answer(request):
    """(status, body) of a request."""
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def server_of(address):
    """The process that listens there."""
    port = f"{int(address.rsplit(':', 1)[1]):04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inode = next(line.split()[9] for line in lines if line.split()[1].endswith(f":{port}") and line.split()[3] == "0A")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == f"socket:[{inode}]":
                return int(link.parts[2])
        except OSError:
            continue
    raise AssertionError("nobody listens")


def resident(pid):
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_file_of_the_machine_is_given(served, record_property):
    address, _ = served
    for secret in SECRETS:
        for place in (f"/gradio_api/file={secret}", f"/file={secret}", f"/static/{secret}", f"/assets/{secret}"):
            status, body = answer(address + place)
            assert b"root:" not in body and b"PATH=" not in body, place
            assert status >= 400 or b"<html" in body.lower() or b"<!doctype" in body.lower(), (place, status)
    record_property("fault", [f"{4 * len(SECRETS)} paths of others' files asked of the app", "none is given", "so"])


def test_an_upload_stays_in_its_folder(served, record_property):
    address, temporary = served
    before, mark = {*temporary.parent.rglob("*")}, uuid.uuid4().hex
    for name in (f"../../{mark}", f"/tmp/{mark}", f"..\\{mark}", f"a/../../../{mark}"):
        body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nhi\r\n--x--\r\n'.encode()
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer(urllib.request.Request(f"{address}/gradio_api/upload", body, headers))
    new = [path for path in {*temporary.parent.rglob("*")} - before if path.is_file()]
    assert all(path.is_relative_to(temporary / "gradio") for path in new), new
    assert not [*Path("/tmp").glob(f"*{mark}*")]
    record_property(
        "fault", ["4 uploads with names that lead out", "stay in the app's folder", f"{len(new)} files there"]
    )


def test_limits_hold_for_twenty_at_once_and_memory_comes_back(served, record_property):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    address, _ = served
    pid, client = server_of(address), Client(address, verbose=False)
    ask = lambda change: client.predict(**{**SETTINGS, **change}, api_name="/class_to_image")  # noqa: E731

    def refused(i):
        change = ({"steps": 100_000}, {"count": 1000}, {"labels": [0] * 10_000}, {"labels": [99]})[i % 4]
        with pytest.raises(AppError):
            ask(change)

    for _ in range(20):
        ask({})
    with ThreadPoolExecutor(20) as pool:
        [*pool.map(refused, range(20))]
        before = resident(pid)
        [*pool.map(lambda i: ask({"seed": i}), range(200))]
    end = time.monotonic() + 60
    while (grown := resident(pid) - before) >= MOST_GROWTH and time.monotonic() < end:
        time.sleep(1)
    said = f"{before / 2**20:.0f} MiB -> {(before + grown) / 2**20:.0f} MiB"
    record_property("fault", ["20 jobs at once above the limits, 200 within", "refused; memory comes back", said])
    assert grown < MOST_GROWTH, said
