"""What `sample` and its Python form are asked for: pictures in memory, flags without effect, counts."""

import jax
import numpy as np
import pytest
from PIL import Image

import pixelflow_jax as pf
from pixelflow_jax import sample
from pixelflow_jax.common.errors import LONGEST, UserError
from pixelflow_jax.config import load_config
from pixelflow_jax.requests import request
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.generate import build_sampler, save_png

from conftest import TINY, calm

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(trained):
    return pf.load(trained)


def test_an_image_in_memory_is_a_start_like_a_file(model, tmp_path):
    """Catches pixels that are taken for a path, come in by another way than files, or are not named in
    the settings; and a message as long as an array."""
    with_alpha = Image.fromarray(RGB)
    with_alpha.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)))
    turned = Image.fromarray(RGB)
    turned.getexif()[0x0112] = 6
    asked = dict(from_stage=1, strength=0.5, labels=[3])
    places = set()
    for number, value in enumerate((Image.fromarray(RGB), RGB, with_alpha, turned, RGB / 255)):
        path = tmp_path / f"{number}.png"
        if isinstance(value, Image.Image):
            value.save(path, exif=value.getexif())
        else:
            Image.fromarray(RGB).save(path)
        ours = model._job({"init_image": value, **asked})
        for other in (str(path), path, [value], [path]):
            theirs = model._job({"init_image": other, **asked})
            np.testing.assert_array_equal(ours.start.images, theirs.start.images)
            assert ours.settings["start"]["sha256"] == theirs.settings["start"]["sha256"]
        places.add(ours.settings["start"]["init_image"])
        kept = ours.settings_of(0)["start"]
        assert kept["strength"] == 0.5 and str(tmp_path) not in str(kept)
    assert len(places) == 3 and all(place.startswith("sha256:") for place in places)
    pair = model._job({"init_image": np.stack([RGB, RGB[::-1]]), **asked})
    assert pair.start.images.shape == (2, 16, 16, 3)
    for bad in (object(), 7, [], RGB.astype(int), np.zeros((400, 400, 9)), {"a": RGB}, b"xx"):
        with pytest.raises(UserError, match="init_image") as error:
            model._job({"init_image": bad, **asked})
        assert len(str(error.value)) < 200


def test_a_picture_that_began_elsewhere_says_what_it_needs(model, trained, tmp_path):
    """Catches an image that is made from another start than its settings say."""
    pair = [RGB, RGB[::-1]]
    made = model.run(init_image=pair, strength=0.5, labels=[3, 4], num_images=4, num_steps=1)
    picture = tmp_path / "a.png"
    save_png(picture, made.pixels[3], made.settings[3])
    with pytest.raises(UserError, match="began from init_image.*add --init_image=FILE"):
        request.parse("", [f"--checkpoint={trained}", "--out=x", f"--from_png={picture}"])
    again = model.sample(from_png=picture, init_image=pair[1])
    assert np.abs(again[0].astype(int) - made.pixels[3]).max() <= 1  # of another batch size
    with pytest.raises(UserError, match="--init_image is not what .* began from"):
        model.sample(from_png=picture, init_image=pair[0])
    save_png(picture, made.pixels[3], {**made.settings[3], "start": "from_noise"})
    with pytest.raises(UserError, match="began from from_noise.*needs that image"):
        request.parse("", [f"--checkpoint={trained}", "--out=x", f"--from_png={picture}"])


def test_long_values_are_cut_in_messages(model):
    """Catches a message that repeats a value of any length."""
    for settings in (dict(labels=[10] * 10**6), dict(prompt="x" * 10**6), dict(init_image="y" * 10**6),
                     dict(solver="s" * 10**6), dict(seed="1" * 10**6)):  # fmt: skip
        with pytest.raises((UserError, OSError)) as error:
            model.sample(**settings)
        assert len(str(error.value)) <= LONGEST + 10


GIVEN = dict(first_image="1", seed="0", num_images="1", num_png="1", context="1", layout="dpg")
ALLOWED = {
    "init_image": {"seed", "first_image", "num_images", "num_png", "context", "layout", "save_stages"},
    "from_noise": {"num_images", "num_png", "context", "layout", "save_stages"},
    "interpolate": {"num_images", "num_png", "context", "layout", "save_stages"},
    "invert": set(),
}


@pytest.mark.parametrize("start", request.STARTS)
def test_flags_without_effect_are_refused(start, tmp_path):
    """Catches a flag that is ignored in silence, even where it repeats a default; and one that a picture
    brings along, which is no request."""
    flags = ["--checkpoint=x", "--out=y", f"--{start}={'3,4' if start == 'interpolate' else 'z'}"]
    given = [f"--{name}={value}" for name, value in GIVEN.items()] + ["--save_stages"]
    given += ["--strength=1", "--from_stage=0"] if start != "init_image" else []
    for flag in given:
        name = flag.removeprefix("--").partition("=")[0]
        if name in ALLOWED[start]:
            request.parse("", [*flags, flag])
            continue
        with pytest.raises(UserError, match=f"--{name}.*(does nothing|go with)"):
            request.parse("", [*flags, flag])
    kept = dict(seed=7, first_image=9, num_images=1, batch_size=2, labels=[4])
    save_png(tmp_path / "a.png", RGB, kept)
    args = request.parse("", [*flags, f"--from_png={tmp_path / 'a.png'}"])
    assert args.labels == (4,) and args.first_image == (9 if start == "init_image" else None)


@pytest.mark.parametrize("flag", "--num_images --batch_size --num_steps --num_png --context".split())
@pytest.mark.parametrize("value", [10**12, 10**17, -1, -(10**12)])
def test_absurd_counts(trained, tmp_path, flag, value):
    """Catches a count that is tried: gigabytes, or a traceback, in place of a sentence."""
    with pytest.raises(UserError, match=f"{flag} must (be at least|lie in)"):
        sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", f"{flag}={value}"])
    assert not (tmp_path / "out").exists()


def test_more_images_than_memory(model):
    """Catches counts that are allowed and cannot be held."""
    for settings in (
        dict(num_images=10**7, height=4096, width=4096),
        dict(batch_size=65536, height=8192),
    ):
        with pytest.raises(UserError, match="GiB, this machine has"):
            model._job({"labels": [1], **settings})
    with pytest.raises(UserError, match="GiB, this machine has"):
        next(model.stream(labels=[1], num_images=10**6, height=512, width=512, num_steps=1))


@pytest.mark.parametrize("strength", [0, 1e-300, 1e-7, 1e-6, 9.9e-6, -1, 1.1, float("nan")])
def test_strengths_that_leave_no_step(model, strength):
    """Catches a stage without a step, which ended in a traceback."""
    with pytest.raises(UserError, match="strength must be at least 1e-05 and at most 1"):
        model._job(dict(init_image=RGB, strength=strength, labels=[1]))


@pytest.mark.parametrize(
    ("grid", "solver"), [("uniform", "euler"), ("uniform", "dopri5"), ("reference", "heun")]
)
def test_the_least_strength_is_the_image_itself(grid, solver):
    """Catches a solver that cannot take so short a step, and an image that changes in it."""
    config = load_config("configs/digits.py", [*TINY, "model.depth=1", f"sample.grid={grid}"])
    config.sample.solver = solver
    image = np.linspace(-1, 1, 16 * 16 * 3, dtype=np.float32).reshape(1, 16, 16, 3)
    sampler = build_sampler(config)
    start = starts.from_images(sampler, 0, image, config.cascade.num_stages - 1, starts.LEAST_STRENGTH)
    noise = start.noise(sampler, start.inputs(np.arange(1)))
    conditions = [{"labels": np.zeros(1, np.int32)}] * 2
    run = jax.jit(lambda p: sampler.run(p, noise, *conditions, start.stage, start.tau).ends[-1])
    assert np.abs(run(calm(sampler.model)) - image).max() < 1e-3


def test_an_inversion_needs_the_class_of_its_images(trained, tmp_path):
    """Catches images that are inverted as classes 0, 1, 2, ... because nobody said which."""
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--invert needs the class of each image: --labels"):
        sample.main(
            [f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", f"--invert={tmp_path / 'a.png'}"]
        )
    assert not (tmp_path / "out").exists()
