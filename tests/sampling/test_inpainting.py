"""Inpainting: what is kept, its path through the stages, repeated steps, and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

import pixelflow_jax as pf
from pixelflow_jax import sample
from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.generate import build_sampler, make_generate, make_stages
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.inpainting import Given, at_stage
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.sampling.starts import image_keys
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY, calm

CASCADE = Cascade(3)


def pictures(count=2, side=16):
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def masks(count=2, side=16):
    """Where images are kept: a ragged half."""
    return np.random.default_rng(1).random((count, side, side, 1)) < np.linspace(0, 2, side)[:, None]


def test_a_coarse_pixel_is_kept_if_all_below_it_are():
    """Catches a coarse stage that is bound by pixels which the finest one draws anew."""
    given = Given(pictures(), masks(), jnp.zeros((2, 4, 4, 3)), image_keys(0, jnp.arange(2)))
    blocks = [jnp.zeros((2, side, side, 3)) for side in (8, 16)]
    for stage, factor in enumerate((4, 2, 1)):
        found = at_stage(given, CASCADE, blocks, 0, stage).kept
        side = 16 // factor
        blocked = masks().reshape(2, side, factor, side, factor, 1)
        np.testing.assert_array_equal(found, blocked.all((2, 4)))


def test_the_kept_path_goes_on_over_a_step_up():
    """Catches noise of the kept part that is another one than the sample's after a step up."""
    sampler = Sampler(PixelFlow(2, 8, 2, 2, 10), CASCADE, 16, 16)
    start = starts.from_images(sampler, 0, pictures(), 0, kept=masks())
    noise = start.noise(sampler, start.inputs(np.arange(2)))
    np.testing.assert_array_equal(noise.given.noise, noise.start)
    for stage in (1, 2):
        before, now = (at_stage(noise.given, CASCADE, noise.blocks, 0, s) for s in (stage - 1, stage))
        stepped = sampler.step_up(stage, before.x_end, noise.blocks[stage - 1])
        np.testing.assert_allclose(stepped, now.x_start, atol=1e-5)
        eps = (now.x_end - CASCADE.end[stage] * images.down(pictures(), 2 - stage)) / (
            1 - CASCADE.end[stage] or 1
        )
        if stage < 2:
            assert np.std(eps) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_going_back_keeps_the_law(stage):
    """Catches repeated steps whose mean, or noise of either kind, is not that of the earlier time."""
    cascade, count, side = CASCADE, 4000, 4
    clean = jnp.asarray(pictures(1, 4 * 2 ** (2 - stage)))
    clean = jnp.broadcast_to(clean, (count, *clean.shape[1:]))
    noise = jax.random.normal(jax.random.key(0), (count, side, side, 3))
    kept = jnp.zeros((*clean.shape[:3], 1), bool)
    given = Given(clean, kept, noise, image_keys(0, jnp.arange(count)))
    point = at_stage(given, cascade, [None] * 2, stage, stage)
    early, late = 0.3, 0.8
    path = [tau * point.x_end + (1 - tau) * point.x_start for tau in (early, late)]
    x = jax.jit(lambda x: point.back(x, late, early, 5))(path[1])
    spread = 1 - (early * point.end + (1 - early) * point.start)
    for part in (lambda y: images.up(images.down(y)), lambda y: y - images.up(images.down(y))):
        got, wanted = part(x), part(path[0])
        bound = 5 * spread / np.sqrt(count)
        np.testing.assert_allclose(got.mean(0), wanted.mean(0), atol=2 * bound)
        assert float(got.std(0).mean()) == pytest.approx(float(wanted.std(0).mean()), rel=0.02)
    again = jax.jit(lambda x: point.back(x, late, early, 6))(path[1])
    assert float(jnp.abs(x - again).mean()) > 0.1 * spread  # new noise


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network that compiles in seconds, and heeds its labels."""
    workdir = tmp_path_factory.mktemp("inpainting") / "run"
    config = load_config("configs/digits.py", TINY)
    save_params(workdir, calm(build_model(config)), config)
    return workdir


@pytest.mark.parametrize(
    ("solver", "resample", "first", "interval"),
    [
        ("euler", 0, 0, (0, 1)),
        ("ab2", 2, 0, (0, 0.5)),
        ("midpoint", 1, 1, (0, 1)),
        pytest.param("heun", 3, 0, (0, 1), marks=pytest.mark.slow),
        pytest.param("dopri5", 1, 2, (0, 1), marks=pytest.mark.slow),
    ],
)
def test_kept_pixels_are_exact(solver, resample, first, interval):
    """Catches a kept pixel that changes at all, and images that depend on neighbours or the program."""
    model = PixelFlow(2, 8, 2, 2, num_classes=10)
    guidance = Guidance(2.0, "constant", interval)
    sampler = Sampler(model, CASCADE, 16, 16, TimeGrid((3,)), guidance, solver, step_control="fixed")
    sampler = dataclasses.replace(sampler, resample=resample)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)
    clean, kept = np.asarray(images.from_uint8(pixels)), masks()
    start = starts.from_images(sampler, 0, clean, first, kept=kept)
    conditions = class_conditions(np.array([1, 2, 1], np.int32), 10)
    inputs, params = start.inputs(np.arange(3)), calm(model)
    out = make_generate(sampler, start)(params, inputs, *conditions)
    expected = pixels[[0, 1, 0]]
    same = (np.asarray(out.pixels) == expected).all(-1)
    assert same[kept[[0, 1, 0], ..., 0]].all() and not same.all() and out.finite.all()
    per_step = {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "dopri5": 6}[solver]
    assert (np.asarray(out.nfe) == 3 * per_step * (1 + resample)).all()

    *_, last = make_stages(sampler, start)(params, inputs, *conditions)
    np.testing.assert_array_equal(last.pixels, out.pixels)
    alone = jax.tree.map(lambda x: x[:1], (inputs, *conditions))
    other = np.asarray(make_generate(sampler, start)(params, *alone).pixels).astype(int)
    assert np.abs(other[0] - np.asarray(out.pixels[0])).max() <= 1


def write(folder, name, pixels):
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_by_command_python_and_picture(trained, tmp_path):
    """Catches a mask that one way in reads otherwise, and pictures that cannot be made again."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (32, 24, 3), np.uint8)
    mask = np.full((32, 24), 127, np.uint8)  # below 128: kept
    mask[:, 12:] = 128
    files = [f"--init_image={write(tmp_path, 'photo.png', photo)}"]
    files += [f"--mask={write(tmp_path, 'mask.png', mask)}"]
    flags = [f"--checkpoint={trained}", "--labels=3", "--num_images=3", "--resample=1", *files]
    sample.main([*flags, f"--out={tmp_path / 'out'}"])
    made = [np.asarray(Image.open(tmp_path / "out" / f"00000{i}.png")) for i in range(3)]
    fitted = ImageOps.fit(Image.fromarray(photo), (16, 16), Image.Resampling.LANCZOS)
    for one in made:
        np.testing.assert_array_equal(one[:, :8], np.asarray(fitted)[:, :8])
    assert (made[0][:, 8:] != made[1][:, 8:]).any()

    model = pf.load(trained)
    ways = [
        dict(init_image=str(tmp_path / "photo.png"), mask=Image.fromarray(mask)),
        dict(init_image=photo, mask=mask >= 128),
    ]
    for way in ways:
        again = model.sample(labels=[3], num_images=3, resample=1, **way)
        np.testing.assert_array_equal(again, made)

    picture = tmp_path / "out" / "000002.png"
    settings = Image.open(picture).text["pixelflow_jax"]
    assert str(tmp_path) not in settings and json.loads(settings)["start"]["resample"] == 1
    repeat = [f"--checkpoint={trained}", f"--from_png={picture}"]
    sample.main([*repeat, *files, f"--out={tmp_path / 'again'}"])
    np.testing.assert_array_equal(Image.open(tmp_path / "again" / "000000.png"), made[2])
    with pytest.raises(UserError, match="does not carry: add --init_image=FILE --mask=FILE"):
        sample.main([*repeat, f"--out={tmp_path / 'x'}"])
    other = write(tmp_path, "other.png", 255 - mask)
    with pytest.raises(UserError, match="--mask is not what"):
        sample.main([*repeat, files[0], f"--mask={other}", f"--out={tmp_path / 'x'}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask={black}"], "go with --init_image"),
        (["--init_image={photo}", "--resample=1"], "goes with --mask"),
        (["--init_image={photo}", "--mask={black}"], "black everywhere at 16x16: nothing is drawn"),
        (["--init_image={photo}", "--mask={white}"], "white everywhere at 16x16: nothing is kept"),
        (["--init_image={photo}", "--mask={small}"], "is 16x16, its image 24x24: give both the same"),
        (["--init_image={photo}", "--mask={clear}"], "alpha channel"),
        (["--init_image={photo}", "--mask={folder}"], "holds 2 masks for 1 images"),
        (["--init_image={photo}", "--mask=nowhere.png"], "--mask=nowhere.png does not exist"),
        (["--init_image={photo}", "--mask={half}", "--solver=dopri5"], "--step_control=fixed"),
        (["--init_image={tiny}", "--mask={tiny}", "--from_stage=1"], "takes images of 16x16"),
        (["--init_image={photo}", "--mask={half}", "--resample=-1"], "at least 0"),
    ],
)
def test_bad_masks(trained, tmp_path, flags, message):
    """Catches a traceback, or an output folder made for a request that cannot be met."""
    half = np.zeros((24, 24), np.uint8)
    half[12:] = 255
    made = {"photo": np.full((24, 24, 3), 9, np.uint8), "black": 0 * half, "white": 0 * half + 255}
    made |= {"small": half[4:20, :16], "half": half, "tiny": half[8:16, :8]}
    made |= {"clear": np.stack([half] * 4, axis=-1)}
    (tmp_path / "folder").mkdir()
    for name in "ab":
        write(tmp_path / "folder", f"{name}.png", half)
    places = {name: write(tmp_path, f"{name}.png", x) for name, x in made.items()}
    flags = [flag.format(**places, folder=tmp_path / "folder") for flag in flags]
    with pytest.raises(UserError, match=message):
        sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", "--labels=1", *flags])
    assert not (tmp_path / "out").exists()


def test_text_and_students_keep_too(trained):
    """Catches a condition or a student's single steps that lose what is given."""
    sizes = ["model.num_heads=2", "model.head_dim=8", "model.depth=2", "model.context_dim=16"]
    text = load_config("t2i_tiny", [*sizes, "sample.num_steps=2,"])
    student = load_config("digits_few", [*TINY, f"distill.teacher={trained}", "sample.num_steps=1,"])
    ids = {"text_ids": np.full((2, 16), 3, np.int32), "text_mask": np.ones((2, 16), bool)}
    labels = class_conditions(np.array([1, 2], np.int32), 10)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for config, conditions in ((text, (ids, ids)), (student, labels)):
        sampler = build_sampler(config)
        start = starts.from_images(sampler, 0, np.asarray(images.from_uint8(pixels)), 0, kept=masks())
        params = calm(sampler.model)
        out = make_generate(sampler, start)(params, start.inputs(np.arange(2)), *conditions)
        same = (np.asarray(out.pixels) == pixels).all(-1)
        assert same[masks()[..., 0]].all() and not same.all()
