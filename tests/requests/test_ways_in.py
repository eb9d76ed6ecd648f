"""One request, whichever way it comes in: the same values, the same checks, the same sentence."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelflow_jax.common import UserError
from pixelflow_jax.requests.request import FROM_PNG, SETTINGS, Request, fill, parse
from pixelflow_jax.sampling.generate import save_png

FLAGS = ["--checkpoint=run", "--out=out"]
PIXELS = np.zeros((8, 8, 3), np.uint8)
SAME = [
    ("num_steps", "2,3", [(2, 3), [2, 3], np.array([2, 3]), [np.int64(2), 3], jnp.array([2, 3]), "2,3"]),
    ("num_steps", "5", [5, np.int32(5), [5], np.array(5), "5"]),
    ("seed", "4294967295", [2**32 - 1, np.uint32(2**32 - 1), np.array(2**32 - 1)]),
    ("guidance_scale", "2.4", [2.4, np.float64(2.4), np.float32(2.4)]),
    ("guidance_scale", "2", [2, 2.0, np.int64(2)]),
    ("guidance_interval", "0.25,0.5", [(0.25, 0.5), [np.float32(0.25), 0.5], np.array([0.25, 0.5])]),
    ("labels", '3,"10",cat', [[3, "10", "cat"], (np.int64(3), np.str_("10"), "cat")]),
    ("labels", "0,1,2", [range(3), np.arange(3), [0, 1, 2]]),
    ("prompt", "a, red two", ["a, red two", ["a, red two"], ("a, red two",)]),
    ("solver", "ab2", ["ab2", np.str_("ab2")]),
]


@pytest.mark.parametrize(("name", "flag", "values"), SAME)
def test_the_same_request(name, flag, values, tmp_path):
    """Catches a value that the command line, Python and a PNG file understand in different ways."""
    expected = parse("", [*FLAGS, f"--{name}={flag}"])
    for value in values:
        assert fill(checkpoint="run", out="out", **{name: value}) == expected
    kept = getattr(expected, name)
    key, kept = ("prompts", kept) if name == "prompt" else (name, kept)
    save_png(tmp_path / "a.png", PIXELS, {key: kept})
    found = fill(checkpoint="run", out="out", from_png=tmp_path / "a.png")
    assert dataclasses.replace(found, from_png=None) == expected


BAD = [
    *(
        ("num_steps", bad)
        for bad in (0, [5, -1], 10_001, "many", [], "", [2.5], [[2]], [True], {"a": 1})
    ),
    *(("seed", bad) for bad in (-1, 2**32, "x", 1.5, True, [1], "9" * 5000)),
    *(("num_images", bad) for bad in (0, -1, 10**12, "1.5", False)),
    *(("guidance_scale", bad) for bad in ("strong", [1.0], True, {})),
    *(("labels", bad) for bad in ("", "3,", [], [1.5], [None], [[3]], {"a": 1}, True)),
    *(("prompt", bad) for bad in ([], [3], 7, [["a"]], "a\ud800")),
    *(("solver", bad) for bad in ("rk4", "", 3, ["euler"])),
    *(("height", bad) for bad in ("tall", 1.5, [16])),
    *(("dtype", bad) for bad in ("float64", 32)),
]


@pytest.mark.parametrize(("name", "bad"), BAD)
def test_the_same_sentence(name, bad, tmp_path):
    """Catches a bad value that one way in takes, or that each refuses in other words."""
    with pytest.raises(UserError, match=f"--{name}") as error:
        Request("run", **{name: bad})
    said = str(error.value)
    if isinstance(bad, str) and name != "prompt":
        with pytest.raises(UserError) as error:
            parse("", [*FLAGS, f"--{name}={bad}"])
        assert str(error.value) == said
    key, bad = ("prompts", [bad] if isinstance(bad, str) else bad) if name == "prompt" else (name, bad)
    save_png(tmp_path / "a.png", PIXELS, {key: bad})
    with pytest.raises(UserError, match="settings that do not fit") as error:
        fill(checkpoint="run", from_png=tmp_path / "a.png")
    assert str(error.value).endswith(said.partition(", got")[2])


ONE = st.sampled_from(
    [None, True, 0, -1, 3, 2**64, 0.5, 1e308, float("nan"), "", "3", "a/b", "~", "\ud800"]
)
JSON = ONE | st.lists(ONE, max_size=3) | st.lists(st.lists(ONE, max_size=1), max_size=2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*SETTINGS, "prompts", "start", "other"]), JSON, max_size=4))
def test_a_png_brings_no_paths_and_no_traceback(tmp_path_factory, kept):
    """Catches settings in a picture that reach a file, and values that end in a traceback."""
    path = tmp_path_factory.getbasetemp() / "tangled.png"
    save_png(path, PIXELS, kept)
    try:
        found = fill(checkpoint="run", from_png=path).given()
    except UserError:
        return
    assert found.keys() <= {*FROM_PNG, "checkpoint", "from_png"}
    json.dumps(found)


def test_a_request_cannot_change():
    """Catches a request that a later part of the program changes, or that is kept by reference."""
    asked = [1, 2]
    request = Request("run", labels=asked)
    asked.append(3)
    assert request.labels == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 3
    pixels = Image.fromarray(PIXELS)
    assert Request("run", init_image=pixels, strength=0.5).init_image is pixels


@pytest.mark.parametrize("name", ["seed", "rtol", "labels"])
def test_numbers_too_long_to_show(name):
    """Catches Python's own error for a whole number of thousands of digits."""
    with pytest.raises(UserError, match=f"--{name}: expected .*too large"):
        Request("run", **{name: 10**5000})
