"""The page: its bounds, and the whole of it in a headless browser."""

import argparse
import contextlib
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import pytest

import pixelflow_jax as pf
from pixelflow_jax import demo, sample
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model
from pixelflow_jax.sampling.generate import png_settings, read_image
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY, calm

BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER += ["--window-size=1100,1200"]


@pytest.fixture(scope="module")
def page(trained):
    limits = argparse.Namespace(max_images=4, max_steps=50, text_encoder=None)
    made = demo.Demo(pf.load(trained), limits)
    yield made
    shutil.rmtree(made.folder)


GOOD = ["3", "none", "euler", "constant", 2.0, 7, "16x16", 2, 3, 4]


def test_settings(page):
    """Catches a control that does not reach the sampler, or a picture that cannot be made again."""
    asked = page.settings(*GOOD)
    *_, (shown, status, made) = page.stages(asked)
    assert len(shown) == 4 and "stage 2 of 2: 16x16, 7 evaluations" in status
    settings = made.settings[1]
    assert settings["labels"] == [3] and settings["num_steps"] == [3, 4] and settings["seed"] == 7
    assert "seed 7" in demo.describe(settings)
    (first, second) = page.keep(made)
    np.testing.assert_array_equal(read_image(second), made.pixels[1])
    np.testing.assert_array_equal(page.pipeline.sample(from_png=second)[0], made.pixels[1])
    assert pathlib.Path(first).parent.parent == page.folder


@pytest.mark.parametrize(
    "place, value",
    [
        *((0, x) for x in ("10", "-1", 3, None, "../../etc/passwd")),
        *((1, x) for x in ("", "ten", None)),
        *((2, x) for x in ("rk4", None, ["euler"])),
        *((3, x) for x in ("", "Constant")),
        *((4, x) for x in (-1, 21, float("nan"), "2", None, True)),
        *((5, x) for x in (-1, 2**32, float("inf"), "0")),
        *((6, x) for x in ("9999x9999", "16", "17x16", None)),
        *((7, x) for x in (0, 5, 1e9, None)),
        *((8, x) for x in (0, 51, float("nan"), None)),
    ],
)
def test_bounds(page, place, value):
    """Catches a request past the page's controls that takes the machine, or gets a traceback."""
    values = list(GOOD)
    values[place] = value
    with pytest.raises(UserError):
        page.settings(*values)


def test_prompts():
    """Catches a text model's page that takes no prompt for one, or tells visitors a path."""
    limits = argparse.Namespace(max_images=4, max_steps=50, text_encoder=None)
    config = pf.load_config("configs/t2i_tiny.py")
    page = demo.Demo(types.SimpleNamespace(config=config), limits)
    try:
        asked = page.settings("a red two", "blue", *GOOD[2:])
        assert (asked["prompt"], asked["negative_prompt"]) == ("a red two", "blue")
        for prompt in (None, "", "  ", "x" * 1001, 7):
            with pytest.raises(UserError, match="say what|at most"):
                page.settings(prompt, "", *GOOD[2:])
    finally:
        shutil.rmtree(page.folder)


def test_the_page_of_a_student(tmp_path):
    """Catches controls whose first request a student refuses."""
    gradio = pytest.importorskip("gradio")
    overrides = [x for x in TINY if not x.startswith("sample.num_steps")]
    config = pf.load_config("configs/digits_few.py", overrides)
    save_params(tmp_path, calm(build_model(config)), config)
    limits = argparse.Namespace(max_images=4, max_steps=50, text_encoder=None)
    page = demo.Demo(pf.load(tmp_path), limits)
    try:
        with gradio.Blocks():
            controls = page._controls(gradio)
        assert [control.visible for control in controls[1:5]] == [False] * 4
        assert [number for number, _ in controls[-1].choices] == ["1", "2", "4", "8"]
        *_, (_, status, _) = page.stages(page.settings(*(control.value for control in controls)))
        assert "2 evaluations" in status
    finally:
        shutil.rmtree(page.folder)


def test_sizes(page):
    """Catches a size on offer that the model cannot draw, or the trained one missing."""
    found = page.sizes()
    assert found[0] == "16x16" and "32x16" in found
    sampler = pf.build_sampler(page.pipeline.config)
    for size in found:
        width, height = map(int, size.split("x"))
        sampler.cascade.check_size(height, width, sampler.model.patch_size)
        assert 128 <= width * height <= 512


@pytest.mark.parametrize("flags", [["--port=99999"], ["--max_steps=0"], ["--checkpoint=none"]])
def test_bad_flags(trained, flags):
    """Catches a traceback for a flag that cannot be."""
    pytest.importorskip("gradio")
    with pytest.raises(UserError):
        demo.main([f"--checkpoint={trained}", *flags])


@contextlib.contextmanager
def running(checkpoint):
    """The address of the demo, as a command of its own."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "pixelflow_jax.demo", f"--checkpoint={checkpoint}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline()).group()
        finally:
            process.terminate()


def open_browser(tmp_path):
    """A headless Chromium that downloads into tmp_path / "downloads"."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*BROWSER, f"--user-data-dir={tempfile.mkdtemp(dir=tmp_path)}"):
        options.add_argument(flag)
    folder = str(tmp_path / "downloads")
    options.add_experimental_option("prefs", {"download.default_directory": folder})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


@pytest.fixture
def browser(tmp_path):
    made = open_browser(tmp_path)
    yield made
    made.quit()


def choose(browser, name: str, value: str) -> None:
    """Types a value into a control and leaves it."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    until(lambda: browser.find_elements(By.CSS_SELECTOR, f"#{name} input"))
    control = browser.find_element(By.CSS_SELECTOR, f"#{name} input")
    control.click()
    control.send_keys(Keys.CONTROL, "a")
    control.send_keys(value)
    if control.get_attribute("role") == "combobox":
        # In one go: the list is drawn anew with every letter
        press = "const o = document.querySelector(arguments[0]); const e = {bubbles: true};"
        press += "if (o) o.dispatchEvent(new MouseEvent('mousedown', e)); return !!o"
        until(lambda: browser.execute_script(press, f"[role=option][aria-label='{value}']"))
        until(lambda: not browser.find_elements(By.CSS_SELECTOR, "[role=option]"))
    else:
        control.send_keys(Keys.TAB)


def until(what, seconds: float = 120.0):
    """What `what()` gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "the page does not come that far"
        time.sleep(0.02)
    return found


def generate(browser) -> list[str]:
    """Presses the button; the lines of status that came, the last with the files."""
    from selenium.webdriver.common.by import By

    # In one go: the page is drawn anew meanwhile
    look = "return [document.querySelector('#status textarea').value, "
    look += "[...document.querySelectorAll('#files a')].map(a => a.href).join()]"
    status, before = browser.execute_script(look)
    seen = [status]
    browser.find_element(By.ID, "generate").click()

    def done():
        status, links = browser.execute_script(look)
        if status and status != seen[-1]:
            seen.append(status)
        return links and links != before and "stage 2 of 2" in seen[-1]

    until(done)
    return seen[1:]


@pytest.mark.slow
def test_in_a_browser(browser, trained, tmp_path):
    """Catches a page that does not draw, stream its stages, take another solver, or give a PNG that
    `sample` makes again bit for bit.
    """
    with running(trained) as url:
        png = visit(browser, url, tmp_path / "downloads")
    sample.main([f"--checkpoint={trained}", f"--from_png={png}", f"--out={tmp_path / 'again'}"])
    np.testing.assert_array_equal(read_image(tmp_path / "again" / "000000.png"), read_image(png))
    settings = png_settings(png)
    assert (settings["solver"], settings["seed"]) == ("heun", 11)


def visit(browser, url: str, downloads: pathlib.Path) -> pathlib.Path:
    """Two pictures, the second with another solver and seed; returns its file."""
    from selenium.webdriver.common.by import By

    browser.get(url)
    until(lambda: browser.find_elements(By.ID, "generate"))
    first = generate(browser)
    assert [line[:12] for line in first] == ["stage 1 of 2", "stage 2 of 2"]
    assert "2 evaluations" in first[0] and "4 evaluations" in first[1]

    choose(browser, "solver", "heun")
    choose(browser, "seed", "11")
    second = generate(browser)
    assert "8 evaluations" in second[-1]  # twice Euler's
    assert len(until(lambda: browser.find_elements(By.CSS_SELECTOR, "#history .thumbnail-item"))) == 2
    browser.find_element(By.CSS_SELECTOR, "#files a").click()
    (png,) = until(lambda: list(downloads.glob("*.png")))
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    return png
