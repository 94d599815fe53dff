"""The app as a user has it: in headless Chromium, and by HTTP."""

import io
import re
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import serving
from PIL import Image
from test_app import make_lora
from tiny_sd import make_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH"),
]
WAIT = 180_000


@pytest.fixture(scope="module")
def address(commands, tmp_path_factory):
    with serving(commands, make_folder(tmp_path_factory.mktemp("sd")), "--max-side", 64) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1300, "height": 1200})
    page.set_default_timeout(WAIT)
    opened(page, address)
    yield page
    page.close()


def opened(page, address):
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    number(page, "Steps", 4)


def number(page, label, value):
    page.get_by_label(f"number input for {label}", exact=True).fill(str(value))
    page.keyboard.press("Tab")


def pictures(page):
    """The addresses in the history, the newest first."""
    return page.eval_on_selector_all("#history img", "images => images.map(image => image.src)")


def make(page, button="#from-text", seed=0):
    """Presses a button; the picture that came of it, as numpy."""
    before = len(pictures(page))
    page.fill("#seed input", str(seed))
    page.keyboard.press("Tab")
    page.click(button)
    page.wait_for_function(f"document.querySelectorAll('#history img').length > {before}")
    return np.asarray(Image.open(fetched(page, pictures(page)[0])).convert("RGB"))


def fetched(page, address):
    return io.BytesIO(page.request.get(address).body())


def refused(page, button, said, before=None):
    """A press of the button is answered by this message; or by `before` while an upload is under way: then it is pressed again."""
    for _ in range(60):
        page.click(button)
        page.get_by_text(re.compile(f"{said}|{before or said}")).first.wait_for()
        if page.get_by_text(said).count():
            return
        page.wait_for_timeout(1000)
    raise AssertionError(f"it was always answered by {before!r}")


def test_a_prompt_makes_a_picture_that_a_seed_repeats_and_a_lora_changes(page, tmp_path):
    page.fill("#prompt textarea", "a red fox")
    first, other, again = make(page, seed=3), make(page, seed=4), make(page, seed=3)
    assert first.shape == (16, 16, 3) and first.std() > 1
    np.testing.assert_array_equal(again, first)
    assert (other != first).any()
    page.get_by_role("button", name="LoRA").click()
    page.set_input_files("#loras input[type=file]", make_lora(tmp_path / "style.safetensors", 20))
    page.get_by_text("style.safetensors").first.wait_for()
    assert (make(page, seed=3) != first).any()
    page.fill("#scales textarea, #scales input", "0")
    np.testing.assert_array_equal(make(page, seed=3), first)
    page.locator("#history img").nth(3).click()  # the second that was made
    page.get_by_text('"seed": 4').first.wait_for()


def test_a_picture_is_changed(page, tmp_path):
    gradient(tmp_path / "a.png")
    page.fill("#prompt textarea", "a red fox")
    page.get_by_role("tab", name="From a picture").click()
    page.set_input_files("#picture input[type=file]", tmp_path / "a.png")
    page.wait_for_selector("#picture img")
    assert make(page, "#from-picture").shape == (16, 16, 3)


def test_a_brush_repaints_only_inside(page, tmp_path):
    original = gradient(tmp_path / "a.png", 32)
    number(page, "Width", 32)
    number(page, "Height", 32)
    page.fill("#prompt textarea", "a red fox")
    page.get_by_role("tab", name="Repaint").click()
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(2000)  # a picture that comes while the editor is made is lost
    page.set_input_files("#editor input[type=file]", tmp_path / "a.png")
    refused(page, "#repaint", "nothing is painted", "there is no picture")
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 5, y + 5, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1000)
    changed = (make(page, "#repaint") != original).any(-1)
    assert changed.any() and not changed[[0, -1]].any() and not changed[:, [0, -1]].any()
    rows, columns = np.nonzero(changed)
    assert np.ptp(rows) < 14 and np.ptp(columns) < 14 and abs(rows.mean() - 16) < 3


def test_wrong_inputs_are_told(page, tmp_path):
    refused(page, "#from-text", "the prompt is empty")
    page.fill("#prompt textarea", "a red fox")
    page.get_by_role("button", name="LoRA").click()
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04" + b"0" * 1000)
    page.set_input_files("#loras input[type=file]", tmp_path / "bad.safetensors")
    page.get_by_text("bad.safetensors").first.wait_for()
    refused(page, "#from-text", "bad.safetensors is no safetensors file")


def test_stop_ends_a_job_and_two_pages_are_served_in_turn(page, browser, address):
    page.fill("#prompt textarea", "a red fox")
    make(page)
    other = browser.new_page()
    other.set_default_timeout(WAIT)
    opened(other, address)
    other.fill("#prompt textarea", "a green tree")
    for label, value in (("Steps", 150), ("Pictures", 4), ("Steps between two previews (0 for none)", 1)):
        number(page, label, value)
    page.click("#from-text")
    page.wait_for_selector("#status progress")
    other.click("#from-text")
    other.get_by_text("queue: ").first.wait_for()
    assert not other.locator("#status progress").count()
    page.get_by_role("button", name="Stop").click()
    other.wait_for_selector("#history img")
    assert len(pictures(page)) == 1
    make(page, seed=1)
    other.close()


def test_the_api_is_of_the_same_functions_and_limits_hold(address):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    settings = {"steps": 3, "seed": 5, "width": 16, "height": 16, "count": 2}
    (first, _, facts), (again, _, _) = (
        client.predict("a red fox", api_name="/text_to_image", **settings) for _ in range(2)
    )
    assert [fact["index"] for fact in facts] == [0, 1]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one["image"])), np.asarray(Image.open(two["image"])))
    for change in ({"steps": 1000}, {"count": 100}, {"width": 4096}):
        with pytest.raises(AppError, match=r"1000|100|4096|maximum"):
            client.predict("a red fox", api_name="/text_to_image", **{**settings, **change})


def test_a_password_is_asked_for(commands, tmp_path):
    with (
        serving(commands, make_folder(tmp_path), "--auth", "me:secret") as address,
        pytest.raises(urllib.error.HTTPError, match="401"),
    ):
        urllib.request.urlopen(f"{address}/gradio_api/info")


def test_what_cannot_be_served_is_one_line(commands, tmp_path):
    for arguments, said in (
        ((tmp_path,), "app.py: "),
        ((tmp_path, "--auth", "me"), "--auth: give NAME:PASSWORD"),
        ((tmp_path, "--max-steps", 0), "--max-steps=0 must be above 0"),
    ):
        done = commands.run("tools/app.py", *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def gradient(path, size=16):
    """A picture written to a path; its pixels."""
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    pixels = np.stack([*np.broadcast_arrays(ramp[:, None], ramp[None]), np.full((size, size), 128, np.uint8)], -1)
    Image.fromarray(pixels).save(path)
    return pixels
