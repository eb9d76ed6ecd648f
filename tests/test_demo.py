"""The page: its bounds, and the whole of it in a headless browser."""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

import pixelflow_jax as pf
from pixelflow_jax import demo, sample
from pixelflow_jax.errors import UserError
from pixelflow_jax.sampling.generate import read_image

from conftest import TINY

BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER += ["--window-size=1100,1200"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of the default config with a tiny network."""
    workdir = tmp_path_factory.mktemp("demo") / "run"
    pf.fit(pf.load_config("configs/digits.py", TINY), workdir)
    return workdir


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


def test_sizes(page):
    """Catches a size on offer that the model cannot draw, or the trained one missing."""
    found = page.sizes()
    assert found[0] == "16x16" and "32x16" in found
    for size in found:
        width, height = map(int, size.split("x"))
        assert page.pipeline.sample(num_images=1, num_steps=1, height=height, width=width).shape[
            1:3
        ] == (
            height,
            width,
        )


@pytest.mark.parametrize("flags", [["--port=99999"], ["--max_steps=0"], ["--checkpoint=none"]])
def test_bad_flags(trained, flags):
    """Catches a traceback for a flag that cannot be."""
    pytest.importorskip("gradio")
    with pytest.raises(UserError):
        demo.main([f"--checkpoint={trained}", *flags])


@pytest.fixture
def url(trained):
    """The address of the demo, as a command of its own."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "pixelflow_jax.demo", f"--checkpoint={trained}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline()).group()
        process.terminate()


@pytest.fixture
def browser(tmp_path):
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
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


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

    before = [a.get_attribute("href") for a in browser.find_elements(By.CSS_SELECTOR, "#files a")]
    seen = [browser.find_element(By.CSS_SELECTOR, "#status textarea").get_attribute("value")]
    browser.find_element(By.ID, "generate").click()

    def done():
        text = browser.find_element(By.CSS_SELECTOR, "#status textarea").get_attribute("value")
        if text and text != seen[-1]:
            seen.append(text)
        links = [a.get_attribute("href") for a in browser.find_elements(By.CSS_SELECTOR, "#files a")]
        return links and links != before and "stage 2 of 2" in seen[-1]

    until(done)
    return seen[1:]


@pytest.mark.slow
def test_in_a_browser(url, browser, trained, tmp_path, screenshot=None):
    """Catches a page that does not draw, stream its stages, take another solver, or give a PNG that
    `sample` makes again bit for bit.
    """
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(url)
    until(lambda: browser.find_elements(By.ID, "generate"))
    first = generate(browser)
    assert [line[:12] for line in first] == ["stage 1 of 2", "stage 2 of 2"]
    assert "2 evaluations" in first[0] and "4 evaluations" in first[1]

    solver = browser.find_element(By.CSS_SELECTOR, "#solver input")
    solver.click()
    solver.send_keys(Keys.CONTROL, "a")
    solver.send_keys("heun", Keys.ENTER)
    seed = browser.find_element(By.CSS_SELECTOR, "#seed input")
    seed.send_keys(Keys.CONTROL, "a")
    seed.send_keys("11", Keys.TAB)
    second = generate(browser)
    assert "8 evaluations" in second[-1]  # twice Euler's
    assert len(until(lambda: browser.find_elements(By.CSS_SELECTOR, "#history .thumbnail-item"))) == 2
    if screenshot:
        time.sleep(1)
        browser.save_screenshot(screenshot)

    browser.find_element(By.CSS_SELECTOR, "#files a").click()
    (png,) = until(lambda: list((tmp_path / "downloads").glob("*.png")))
    sample.main([f"--checkpoint={trained}", f"--from_png={png}", f"--out={tmp_path / 'again'}"])
    np.testing.assert_array_equal(read_image(tmp_path / "again" / "000000.png"), read_image(png))
    settings = sample.request.png_settings(png)
    assert (settings["solver"], settings["seed"]) == ("heun", 11)
    errors = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not errors
