"""Starts other than a seed's noise, inversion, and sampling through shards."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixelflow_jax import sample
from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError, arrays
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.requests.output import OutputFolder
from pixelflow_jax.sampling import starts
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.guidance import Guidance
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.sampling.starts import image_keys
from pixelflow_jax.training.checkpoints import save_params

from conftest import TINY, calm

MODEL = PixelFlow(2, 8, 2, 2, num_classes=10)


def make_sampler(**kwargs):
    kwargs = dict(grid=TimeGrid((3,)), height=16, width=16, guidance=Guidance(1.5)) | kwargs
    return Sampler(MODEL, Cascade(3), **kwargs)


@pytest.fixture(scope="module")
def calm_params():
    """Those of MODEL."""
    return calm(MODEL)


def test_every_stage_continues_an_ordinary_run(calm_params):
    """Catches a later start whose noise, time or renoising is not that of a run through all stages."""
    sampler = make_sampler()
    noise = sampler.draw_noise(image_keys(0, jnp.arange(2)))
    conditions = class_conditions(jnp.array([1, 2]), 10)
    whole = sampler.run(calm_params, noise, *conditions)
    for stage in (1, 2):
        begin = sampler.step_up(stage, whole.ends[stage - 1], noise.blocks[stage - 1])
        rest = sampler.run(calm_params, noise._replace(start=begin), *conditions, stage)
        np.testing.assert_allclose(rest.ends[-1], whole.ends[-1], atol=1e-5)
        assert len(rest.ends) == rest.nfe.shape[1] == 3 - stage


def test_start_from_images():
    """Catches a start that is off the training path, of images at full size and of small ones."""
    sampler, rng = make_sampler(), np.random.default_rng(0)
    clean = rng.uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    start = starts.from_images(sampler, 0, clean, 1, strength=0.75)
    x = start.noise(sampler, start.inputs(np.arange(3))).start
    drawn = jax.random.normal(jax.random.fold_in(image_keys(0, jnp.array([2]))[0], 1), (8, 8, 3))
    begin, end = sampler.cascade.start[1], sampler.cascade.end[1]
    small = np.asarray(images.down(clean[0]))  # image 2 starts from picture 2 mod 2
    coarse = np.asarray(images.up(images.down(small)))
    low, high = begin * coarse + (1 - begin) * drawn, end * small + (1 - end) * drawn
    np.testing.assert_allclose(x[2], 0.25 * high + 0.75 * low, atol=1e-6)

    upscaling = starts.from_images(sampler, 0, clean[:, :8, :8], 2)
    x = upscaling.noise(sampler, upscaling.inputs(np.arange(2))).start
    drawn = jax.random.normal(jax.random.fold_in(image_keys(0, jnp.array([1]))[0], 2), (16, 16, 3))
    begin = sampler.cascade.start[2]
    np.testing.assert_allclose(
        x[1], begin * images.up(clean[1, :8, :8]) + (1 - begin) * drawn, atol=1e-6
    )

    for bad, message in (
        (dict(stage=3), "must lie in 0..2"),
        (dict(stage=1, strength=0.0), "at least 1e-05"),
        (dict(stage=1, strength=1e-6), "at least 1e-05"),
        (dict(stage=0), "nothing of the images"),
        (dict(images=clean[:, :12, :12]), "takes 16x16, or 8x8 to upscale"),
        (dict(images=clean[:, :8, :8], strength=0.5), "strength must be 1"),
    ):
        with pytest.raises(UserError, match=message):
            starts.from_images(sampler, 0, **{"images": clean, "stage": 2, **bad})


def test_between_seeds():
    """Catches ends that are not the seeds' own noise, and a middle that is not white."""
    sampler = make_sampler()
    start = starts.BetweenSeeds((3, 4), 5)
    made = start.noise(sampler, start.inputs(np.arange(10)))
    for seed, place in ((3, 0), (4, 4)):
        own = sampler.draw_noise(image_keys(seed, jnp.array([0, 1])))
        for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(np.asarray(x)[[place, place + 5]], y, atol=1e-6)
    assert np.std(made.start[2]) == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_inversion_and_back(calm_params):
    """Catches a residual or a direction of time that is wrong: the bound is 2/255 mean error."""
    settings = dict(solver="dopri5", rtol=1e-5, atol=1e-5, guidance=Guidance(2.0, "constant"))
    sampler = make_sampler(**settings)
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    conditions = class_conditions(jnp.array([1, 2]), 10)
    noise = jax.jit(lambda x: starts.invert(sampler, calm_params, x, *conditions))(x)
    assert [leaf.shape[1:3] for leaf in (noise.start, *noise.blocks)] == [(4, 4), (8, 8), (16, 16)]
    for block in noise.blocks:
        np.testing.assert_allclose(images.down(block), 0, atol=1e-5)
    back = jax.jit(sampler.sample)(calm_params, noise, *conditions)[-1]
    assert float(jnp.abs(back - x).mean()) * 127.5 < 2


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        pytest.param(dict(solver="bosh3", rtol=1e-2, atol=1e-2), marks=pytest.mark.slow),
    ],
)
def test_images_do_not_depend_on_the_batch_size(calm_params, settings):
    """Catches noise, steps or rounding that make image 0 another one among 1, 7 or 64."""
    sampler = make_sampler(**settings)

    def first(count):
        noise = sampler.draw_noise(image_keys(0, jnp.arange(count)))
        conditions = class_conditions(jnp.arange(count) % 10, 10)
        return np.asarray(jax.jit(sampler.sample)(calm_params, noise, *conditions)[-1][0])

    alone = first(1)
    for count in (7, 64):
        np.testing.assert_allclose(first(count), alone, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a network that compiles in seconds, and heeds its labels."""
    workdir = tmp_path_factory.mktemp("starts") / "run"
    config = load_config("configs/digits.py", TINY)
    save_params(workdir, calm(build_model(config)), config)
    return workdir


def run(trained, out, *flags):
    sample.main([f"--checkpoint={trained}", f"--out={out}", *flags])
    return arrays.read_npz(out / "samples.npz", "arr_0")


def test_a_stopped_run_goes_on(trained, tmp_path, monkeypatch):
    """Catches images that are made twice, left out, or others than those of a run in one go."""
    flags = ["--num_images=11", "--batch_size=2", "--num_png=3"]
    run(trained, tmp_path / "whole", *flags)
    expected = (tmp_path / "whole" / "samples.npz").read_bytes()
    assert not (tmp_path / "whole" / "shards").exists()
    assert len(list((tmp_path / "whole").glob("0*.png"))) == 3

    write, written = OutputFolder.write, []

    def stops(self, index, parts):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index.tolist())
        write(self, index, parts)

    monkeypatch.setattr(OutputFolder, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path / "part", *flags)
    (tmp_path / "part" / "shards" / ".torn.npz.1.tmp").write_bytes(b"x")  # what a kill leaves
    (tmp_path / "early").mkdir()
    shutil.copy(tmp_path / "part" / "settings.json", tmp_path / "early")  # of a kill that came sooner
    monkeypatch.setattr(
        OutputFolder, "write", lambda self, i, p: (written.append(i.tolist()), write(self, i, p))
    )
    run(trained, tmp_path / "part", *flags)
    assert sorted(sum(written, [])) == list(range(11))
    assert (tmp_path / "part" / "samples.npz").read_bytes() == expected
    np.testing.assert_array_equal(
        run(trained, tmp_path / "early", *flags)[8:],
        np.load(tmp_path / "whole" / "samples.npz")["arr_0"][8:],
    )


def test_a_folder_is_claimed_by_its_settings_first(trained, tmp_path, monkeypatch):
    """Catches a kill in the first moment that leaves a folder which the same command refuses."""

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "_found", killed)  # before it looks at what is there
    with pytest.raises(KeyboardInterrupt):
        run(trained, tmp_path / "out", "--num_images=1")
    monkeypatch.undo()
    with pytest.raises(UserError, match="seed differ"):
        run(trained, tmp_path / "out", "--num_images=1", "--seed=1")
    run(trained, tmp_path / "out", "--num_images=1")


def test_another_batch_size_completes_a_run(trained, tmp_path):
    """Catches shards of other chunks that are counted twice or not at all."""
    whole = run(trained, tmp_path / "whole", "--num_images=9")
    folder = OutputFolder(tmp_path / "part", (16, 16, 3), {"labels": np.arange(9)}, 0)
    out = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", out)
    (out / "samples.npz").unlink()
    (out / "shards").mkdir()
    nfe = np.full((9, 2), 4, np.int32)
    for numbers in ([1, 2, 3], [3, 4], [7]):
        folder.write(np.array(numbers), {"arr_0": whole[numbers], "nfe": nfe[numbers]})
    assert folder.missing().tolist() == [0, 5, 6, 8]
    (out / "shards" / "00000005-00000007.npz").write_bytes(b"")  # what a power cut leaves
    np.testing.assert_array_equal(run(trained, out, "--num_images=9", "--batch_size=4"), whole)


def test_settings_say_all(trained, tmp_path):
    """Catches a setting, hash or version that is missing, with which a run could not be repeated."""
    out = tmp_path / "out"
    run(trained, out, "--num_images=2", "--solver=ab2", "--guidance_interval=0.1,0.9", "--save_stages")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["solver"] == "ab2" and settings["guidance_interval"] == [0.1, 0.9]
    assert len(settings["checkpoint_sha256"]) == 64 and settings["versions"]["jax"] == jax.__version__
    assert settings["num_images"] == 2 and "clip" in settings["uint8_rule"]
    assert Image.open(out / "stages" / "000001.png").size == (16 + 2 + 16, 16)
    assert arrays.read_npz(out / "samples.npz", "nfe").tolist() == [[2, 2]] * 2


@pytest.mark.slow
def test_starts_by_command(trained, tmp_path):
    """Catches flags that do not reach the sampler, and an inversion that does not come back."""
    plain = run(trained, tmp_path / "plain", "--labels=3,5")
    picture = tmp_path / "plain" / "000001.png"
    found = {
        name: run(trained, tmp_path / name, "--labels=5", *flags)
        for name, flags in {
            "variation": [f"--init_image={picture}", "--strength=0.5"],
            "early": [f"--init_image={picture}", "--from_stage=0", "--strength=0.5"],
            "negative": ["--negative_labels=3", "--guidance_scale=5"],
            "ordinary": ["--guidance_scale=5"],
        }.items()
    }
    assert len({x.tobytes() for x in found.values()}) == 4
    small = tmp_path / "small.png"
    Image.open(picture).resize((8, 8), Image.BOX).save(small)
    assert run(trained, tmp_path / "up", f"--init_image={small}", "--num_images=2").shape[1:3] == (
        16,
        16,
    )
    between = run(trained, tmp_path / "between", "--interpolate=3,4", "--num_images=4", "--labels=1")
    ends = [run(trained, tmp_path / f"seed{s}", f"--seed={s}", "--labels=1") for s in (3, 4)]
    for place, end in zip((0, 3), ends, strict=True):
        assert np.abs(between[place].astype(int) - end[0]).max() <= 1

    tight = ["--solver=dopri5", "--rtol=1e-5", "--atol=1e-5"]
    pair = tmp_path / "pair"
    pair.mkdir()
    for name in ("000000.png", "000001.png"):
        shutil.copy(tmp_path / "plain" / name, pair)
    kept = tmp_path / "inverted"
    sample.main([f"--checkpoint={trained}", f"--out={kept}", f"--invert={pair}", "--labels=3,5", *tight])
    back = run(trained, tmp_path / "back", f"--from_noise={kept / 'noise.npz'}", *tight)
    assert np.abs(back.astype(int) - plain).mean() < 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_image=nowhere.png"], "does not exist"),
        (["--init_image={text}"], "is not an image"),
        (["--init_image={folder}"], "holds no images"),
        (["--strength=0.5"], "go with --init_image"),
        (["--interpolate=1"], "needs two seeds"),
        (["--interpolate=1,2", "--from_noise=x"], "exclude each other"),
        (["--from_noise=nowhere.npz"], "does not exist"),
        (["--from_noise={text}"], "not a whole npz file"),
        (["--from_noise={other}"], "has no array 'start'"),
        (["--solver=euler", "--step_control=per_image"], "does not estimate its error"),
        (["--rtol=-1"], "rtol must lie"),
        (["--guidance_interval=0.9,0.1"], "low < high"),
        (["--guidance_interval=0.5"], "interval"),
        (["--negative_labels=10"], "not a class"),
        (["--num_png=-1"], "at least 0"),
        (["--seed=-1"], "at least 0 and at most 4294967295"),
        (["--from_stage=1"], "go with --init_image"),
        (["--invert={text}"], "is not an image"),
    ],
)
def test_bad_flags(trained, tmp_path, flags, message):
    """Catches a traceback, or an output folder made for a request that cannot be met."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not an image")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    places = {"text": tmp_path / "text", "folder": tmp_path / "folder", "other": tmp_path / "other.npz"}
    flags = [flag.format(**places) for flag in flags]
    with pytest.raises(UserError, match=message):
        sample.main([f"--checkpoint={trained}", f"--out={tmp_path / 'out'}", "--labels=1", *flags])
    assert not (tmp_path / "out").exists()
