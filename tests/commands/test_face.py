"""The Python face, settings in PNG files, and pictures made again from them."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import pixelflow_jax as pf
from pixelflow_jax import pipeline as pipeline_room
from pixelflow_jax import sample
from pixelflow_jax.common import UserError
from pixelflow_jax.sampling import sampler as sampler_room
from pixelflow_jax.sampling.generate import SETTINGS, png_settings

from conftest import TINY


@pytest.fixture(scope="module")
def model(trained):
    return pf.load(trained)


def test_names():
    """Catches a name of the face that cannot be had, or that editors see and users do not."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(pf))
    typed = {alias.asname for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert typed - {None} == set(pf.__all__)
    assert all(getattr(pf, name) is not None for name in pf.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        importlib.import_module("pixelflow_jax").nothing  # noqa: B018


SETTING = [
    dict(num_images=5, seed=3, num_steps=[2, 3]),
    dict(labels=[7, 1], negative_labels=[2], solver="dopri5", guidance_scale=3.0, rtol=0.1),
    dict(num_images=3, height=16, width=32, solver="heun", guidance_interval=[0.2, 0.8], num_steps=3),
]


@pytest.mark.parametrize(
    "settings", [SETTING[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SETTING[1:])]
)
def test_face_stream_and_command_agree(trained, model, tmp_path, settings):
    """Catches a notebook, the demo and the command making different pictures of the same settings."""
    made = model.run(**settings)
    *_, last = stages = list(model.stream(**settings))
    assert [one.pixels.shape[1] for one in stages] == [8, 16]
    np.testing.assert_array_equal(made.pixels, last.pixels)
    np.testing.assert_array_equal(made.nfe, last.nfe)
    assert made.settings == last.settings

    flags = [
        f"--{name}={','.join(map(str, x)) if isinstance(x, list) else x}" for name, x in settings.items()
    ]
    sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'a'}", *flags])
    with np.load(tmp_path / "a" / "samples.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], made.pixels)
    number = len(made.pixels) - 1
    png = tmp_path / "a" / f"{number:06d}.png"
    assert png_settings(png) == made.settings[number]
    assert str(tmp_path) not in png.read_bytes().decode("latin-1")  # whoever shares it tells no paths

    again = ["--out=" + str(tmp_path / "b"), f"--from_png={png}"]
    sample.main([f"--checkpoint={trained}", *again])
    with np.load(tmp_path / "b" / "samples.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], made.pixels[number:])
    np.testing.assert_array_equal(model.sample(from_png=str(png)), made.pixels[number:])


def test_another_seed_compiles_nothing(model):
    """Catches a demo that compiles for every new seed."""
    model._compiled.clear()
    first = model.sample(num_images=3, num_steps=2, seed=0)
    second = model.sample(num_images=4, num_steps=2, seed=2**32 - 1, labels=[4])
    assert (first != second[:3]).any()
    (program,) = model._compiled.values()
    assert program._cache_size() == 1


def test_first_image_continues_a_set(model):
    """Catches a second part of a set that repeats the first, in noise or in labels."""
    whole = model.run(num_images=12, num_steps=2)
    part = model.run(num_images=4, first_image=8, num_steps=2)
    np.testing.assert_array_equal(part.pixels, whole.pixels[8:])
    assert [one["labels"] for one in part.settings] == [[8], [9], [0], [1]]


def test_flags_replace_those_of_the_picture(model, trained, tmp_path):
    """Catches a picture's settings winning over what the person says."""
    flags = ["--num_images=2", "--num_steps=2"]
    sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'a'}", *flags])
    png = str(tmp_path / "a" / "000001.png")
    changed = model.run(from_png=png, labels=[5], num_steps=3)
    assert changed.settings[0]["labels"] == [5] and changed.settings[0]["num_steps"] == [3]
    assert changed.settings[0]["first_image"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "carries no settings"),
        ("{", "cannot be read"),
        ("[1]", "another form"),
        ('{"num_steps": "many"}', "settings that do not fit"),
        ('{"seed": -1}', "seed must be"),
        ('{"labels": [99]}', "not a class"),
        ('{"start": "init_image"}', "began from init_image"),
        ('{"checkpoint": "/etc/passwd", "out": "/tmp/x", "solver": "rk"}', "settings that do not fit"),
    ],
)
def test_bad_pictures(model, tmp_path, text, message):
    """Catches a traceback, or a path that a picture could bring in."""
    info = PngInfo()
    if text is not None:
        info.add_text(SETTINGS, text)
    path = tmp_path / "bad.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(UserError, match=message):
        model.sample(from_png=str(path))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(labels=[12]), "not a class"),
        (dict(speed=3), "speed is not a setting"),
        (dict(out="x"), "out is not a setting"),
        (dict(solver="rk4"), "must be one of"),
        (dict(num_steps=0), "num_steps"),
        (dict(height=17), "17"),
    ],
)
def test_bad_settings(model, settings, message):
    """Catches a notebook user who gets a traceback from inside."""
    with pytest.raises(UserError, match=message):
        model.sample(**settings)


def test_parts_of_a_large_batch(model, monkeypatch):
    """Catches a batch that is worked off in parts and comes out otherwise than whole."""
    settings = dict(num_images=6, num_steps=2, guidance_scale=2.0)
    whole = model.sample(**settings)
    monkeypatch.setattr(sampler_room, "CPU_TOKENS", 2 * 64 * 2)  # two images with their two halves
    model._compiled.clear()
    parts = model.sample(**settings, batch_size=6)
    np.testing.assert_array_equal(whole, parts)
    model._compiled.clear()


def test_programs_do_not_pile_up(model, monkeypatch):
    """Catches a demo whose memory grows with every guidance scale that is tried."""
    monkeypatch.setattr(pipeline_room, "PROGRAMS", 1)
    model._compiled.clear()
    for scale in (2.0, 3.0):
        model.sample(num_images=1, num_steps=1, guidance_scale=scale)
    ((key, _),) = model._compiled.items()
    assert key[1].guidance.scale == 3.0
    model._compiled.clear()


def test_a_batch_is_as_large_as_the_request(model, trained, tmp_path):
    """Catches one image that costs 25, and a picture that does not tell how it was made."""
    sizes = [model._job(dict(num_images=n)).settings_of(0)["batch_size"] for n in (1, 2, 5, 40)]
    assert sizes == [1, 2, 8, 25]
    flags = ["--num_images=2", "--num_steps=2", "--batch_size=3"]
    sample.main([f"--checkpoint={trained}", f"--out={tmp_path}", *flags])
    png = str(tmp_path / "000001.png")
    assert model._job(dict(from_png=png)).batch_size == 3


def test_a_loop_of_ones_own():
    """Catches `prepare` training otherwise than `fit`."""
    config = pf.load_config("configs/digits.py", [*TINY, "log_every=1"])
    state, step, batches = pf.prepare(config)
    losses = []
    for _ in range(3):
        state, numbers = step(state, next(batches))
        losses.append(float(numbers["loss"]))
    assert int(state.step) == 3


def test_loop_equals_fit(tmp_path):
    """The same, number by number."""
    config = pf.load_config("configs/digits.py", [*TINY, "log_every=1"])
    pf.fit(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    state, step, batches = pf.prepare(config)
    for line in lines:
        state, numbers = step(state, next(batches))
        assert float(numbers["loss"]) == json.loads(line)["loss"]
