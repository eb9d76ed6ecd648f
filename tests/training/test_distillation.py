"""Distillation: targets against flow maps in closed form, starts, resuming, sampling of students."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pixelflow_jax as pf
from pixelflow_jax import convert, doctor, sample
from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.common import UserError, arrays
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import INTERVAL, encode_text
from pixelflow_jax.sampling.generate import build_sampler
from pixelflow_jax.sampling.sampler import STUDENT_STEPS
from pixelflow_jax.text.encoder import make_text_reader
from pixelflow_jax.training import checkpoints, loop, objective
from pixelflow_jax.training.distillation import Distillation, build_distillation, interval_lengths
from pixelflow_jax.training.step import packed_loss
from pixelflow_jax.training.teacher import freeze, read_teacher

from conftest import TINY, calm

FEW = [x for x in TINY if not x.startswith("sample.num_steps")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint with a velocity that bends: random parameters, nowhere zero."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = load_config("configs/digits.py", TINY)
    checkpoints.save_params(folder, calm(build_model(config)), config)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A workdir of a student that has learned for 4 steps; tests only read it."""
    workdir = tmp_path_factory.mktemp("student") / "run"
    loop.train(few(teacher), workdir)
    return workdir


def few(teacher, *overrides):
    return load_config("configs/digits_few.py", [*FEW, f"distill.teacher={teacher}", *overrides])


class Exact:
    """In place of a network: the average velocity of white Gaussian images, in closed form.

    In each 2x2 block, the mean and the rest are independent and Gaussian. The flow scales each by the
    ratio of its standard deviations at the ends of an interval.
    """

    SPREAD = 0.5  # of the clean image's pixels
    scan_unroll = 1

    def __init__(self, cascade: Cascade):
        self.cascade = cascade

    def deviations(self, stage, tau):
        """Standard deviations of a block's mean and of the rest, per pixel."""
        end = tau * self.cascade.end[stage]
        start = (1 - tau) * self.cascade.start[stage]
        noise, clean = 1 - end - start, self.SPREAD
        return jnp.hypot((end + start) * clean, noise), jnp.hypot(end * clean, noise)

    def rate(self, stage, tau, interval):
        """Both factors of x in the average velocity; at length 0, the velocity's."""
        derivatives = jax.jvp(lambda t: self.deviations(stage, t), (tau,), (jnp.ones_like(tau),))
        safe = jnp.where(interval > 0, interval, 1.0)
        later = self.deviations(stage, tau + interval)
        return [
            jnp.where(interval > 0, (after / now - 1) / safe, slope / now)
            for now, slope, after in zip(*derivatives, later, strict=True)
        ]

    def apply(self, variables, tokens, timesteps, layout, labels, interval=None):
        interval = jnp.zeros_like(timesteps) if interval is None else interval / 1000
        out = []
        lengths = layout.split_sequences(interval)
        for stage, (group, x) in enumerate(zip(layout.groups, tokens, strict=True)):
            start, slope = self.cascade.timestep_line(stage)
            tau = (layout.split_sequences(timesteps)[stage] - start) / slope
            size = group.height * group.patch_size, group.width * group.patch_size
            picture = images.unpatchify(x, *size, group.patch_size)
            mean = images.up(images.down(picture))
            of_mean, of_rest = (y[..., None, None, None] for y in self.rate(stage, tau, lengths[stage]))
            velocity = of_mean * mean + of_rest * (picture - mean)
            out.append(images.patchify(velocity, group.patch_size))
        return out


def exact_errors(length: int) -> tuple[float, float]:
    """Largest errors of targets of (the teacher's midpoint over `length`, the student's halves)."""
    cascade = Cascade(2)
    exact = Exact(cascade)
    of_a_stage = jnp.array([length, 1000.0, length, 500, length, 250, length, 500])
    lengths = jnp.repeat(of_a_stage, cascade.num_stages)[None]  # stage i mod 2
    keys = jax.random.split(jax.random.key(0), (1, 16))
    clean = 0.5 * jax.random.normal(jax.random.key(1), (1, 16, 8, 8, 3))
    given = {"labels": jnp.zeros((1, 16), jnp.int32), "interval": lengths}
    batch, layout = objective.corrupt(cascade, 2, clean, given, keys, 10, 0.0)
    distillation = Distillation(cascade, exact, exact, (3.0, 3.0))
    null = {"labels": jnp.full((1,), 10)}
    made = distillation.retarget(batch, layout, {}, {}, null)
    right = exact.apply({}, made.tokens, made.timesteps, layout, **made.condition)
    gaps = [jnp.abs(x - y) for x, y in zip(made.target, right, strict=True)]
    return tuple(max(float(gap[:, kind::2].max()) for gap in gaps) for kind in range(2))


def test_targets_of_known_flows_are_exact():
    """Catches a wrong time, length, half or stage: halves are exact, the midpoint is of second order."""
    with jax.enable_x64(True):
        errors = {length: exact_errors(length) for length in (0, 125, 250, 500)}
    for _, split in errors.values():
        assert split < 1e-10
    assert errors[0][0] < 1e-12
    assert 1e-7 < errors[125][0] < 0.35 * errors[250][0] < 0.35**2 * errors[500][0]


def test_lengths_follow_from_the_place_in_the_batch():
    """Catches a kind of target that depends on the device, and an interval beyond its stage."""
    index = jnp.arange(64)
    lengths = np.asarray(interval_lengths(4, index)).reshape(-1, 4)
    assert (lengths == lengths[:, :1]).all()  # all stages alike
    assert {*lengths[::2].ravel()} == {0, 125} and {*lengths[1::2].ravel()} == {250, 500, 1000}
    assert {*lengths.ravel()} == {0, *(1000 / steps for steps in STUDENT_STEPS)}
    keys = jax.random.split(jax.random.key(0), (1, 64))
    clean, given = jnp.zeros((1, 64, 16, 16, 3)), interval_lengths(4, index)[None]
    condition = {"labels": jnp.zeros((1, 64), jnp.int32), "interval": given}
    batch, layout = objective.corrupt(Cascade(4), 2, clean, condition, keys, 10, 0.0)
    for stage, times in enumerate(layout.split_sequences(batch.timesteps)):
        start, slope = Cascade(4).timestep_line(stage)
        tau, length = (times[0] - start) / slope, given[0, stage::4] / 1000
        assert ((tau > -1e-6) & (tau + length < 1 + 1e-6)).all()
        grid = tau[length > 0] / length[length > 0]
        np.testing.assert_allclose(grid, np.round(grid), atol=1e-5)


def test_a_student_starts_as_its_teacher(teacher):
    """Catches a start that is not the teacher, bit for bit, and an interval that is left out later."""
    config = few(teacher)
    state, step, batches = loop.prepare(config)
    model, (params, _, _) = build_model(config), checkpoints.load_params(teacher)
    layout = build_sampler(config).layout(1, 2)
    x = jax.random.normal(jax.random.key(0), (1, 2, 16, 48))
    args = [x], jnp.full((1, 2), 700.0), layout, jnp.array([[3, 4]])

    def velocity(model, params, **given):
        return jax.jit(lambda p: model.apply({"params": p}, *args, **given))(params)[0]

    expected = velocity(model.clone(intervals=False), params)
    for length in (0.0, 1000.0):
        given = {"interval": jnp.full((1, 2), length)}
        np.testing.assert_array_equal(velocity(model, state.params, **given), expected)
    for batch in itertools.islice(batches, 2):
        state, _ = step(state, batch)
    one, other = (velocity(model, state.params, interval=jnp.full((1, 2), x)) for x in (0.0, 1000.0))
    assert np.abs(one - other).max() > 1e-6


def test_two_steps_come_to_agree_with_one(teacher):
    """Catches targets that teach nothing: the composition error falls."""
    overrides = ["num_train_steps=150", "batch_size=16", "optimizer.warmup_steps=10"]
    config = few(teacher, *overrides, "optimizer.learning_rate=3e-3", "ema.decays=0.9,")
    state, step, batches = loop.prepare(config)
    labels = jnp.arange(20) % 10

    @jax.jit
    def error(params):
        ends = []
        for steps in (1, 2):
            config.sample.num_steps = (steps,)
            sampler = build_sampler(config)
            noise = sampler.draw_noise(jax.random.split(jax.random.key(0), 20))
            labelled = {"labels": labels}
            ends.append(sampler.run(params, noise, labelled, labelled).ends[0])
        return jnp.square(ends[0] - ends[1]).mean()

    before = float(error(state.params))
    for batch in itertools.islice(batches, 150):
        state, _ = step(state, batch)
    assert float(error(state.opt_state["ema"].averages[0])) < 0.25 * before


def test_a_resumed_student_equals_one_that_was_not_stopped(student, teacher, tmp_path):
    """Catches a teacher, its null condition or an average that a resumed run has otherwise."""
    loop.train(few(teacher, "num_train_steps=2", "optimizer.schedule=constant"), tmp_path / "run")
    moved = tmp_path / "moved"
    teacher.rename(moved)
    try:
        resumed, _ = loop.train(few(moved, "optimizer.schedule=constant"), tmp_path / "run")
    finally:
        moved.rename(teacher)
    whole, _ = loop.train(few(teacher, "optimizer.schedule=constant"), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


def test_a_run_keeps_its_teacher(student, teacher, tmp_path, trained):
    """Catches a resumed run that goes on with another teacher, or becomes an ordinary run."""
    with pytest.raises(UserError, match="config.distill.teacher holds other weights"):
        loop.train(few(trained, "num_train_steps=6"), student)
    with pytest.raises(UserError, match="the run there is distilled"):
        loop.train(load_config("configs/digits_few.py", [*FEW, "distill.teacher="]), student)
    with pytest.raises(UserError, match="distill.guidance_scale"):
        loop.train(few(teacher, "distill.guidance_scale=2"), student)
    with pytest.raises(UserError, match="without a teacher"):
        loop.train(few(teacher, "data.label_dropout=0.1"), trained)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["distill.teacher=nowhere"], "config.distill.teacher=nowhere cannot be read"),
        (["model.depth=3"], "does not fit config.model"),
        (["model.num_heads=1", "model.head_dim=16"], "config.model.num_heads is 1, but"),
        (["cascade.gamma=-0.3"], "config.cascade is not that of"),
        (["init_from=somewhere"], "init_from does nothing"),
        (["ema.decays=()"], "needs an average"),
        (["batch_size=10"], "2 kinds of targets"),
        (["sample.num_steps=3"], "num_steps 1, 2, 4, 8 per stage, not 3"),
        (["sample.guidance_scale=2"], "its own is built in"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, tmp_path, overrides, said):
    """Catches a run that starts with a teacher of another network, or that nobody could sample."""
    with pytest.raises(UserError, match=said):
        loop.train(few(teacher, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_doctor_knows_a_students_run(student, teacher, trained, capsys):
    """Catches a check-up that takes a run's own teacher for other data, or another one for its own."""
    flags = [f"--config.{x}" for x in FEW]
    command = ["--config=configs/digits_few.py", f"--workdir={student}", "--no_compile", *flags]
    doctor.main([*command, f"--config.distill.teacher={teacher}"])
    assert "all is well" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main([*command, f"--config.distill.teacher={trained}"])
    assert "config.distill.teacher holds other weights" in capsys.readouterr().out


@pytest.mark.parametrize("encoder", ["joint", "frozen"])
def test_guided_targets_of_texts(encoder, t5_folder, tmp_path):
    """Catches an unconditional half without the empty text, or of the student's encoder.

    Where there is no interval, the target is the teacher's guided velocity.
    """
    small = [x for x in FEW if "sample" not in x] + ["model.context_dim=16", "text.max_length=8"]
    kept = ["text.num_heads=2", "text.head_dim=4", "text.mlp_dim=24"]
    kept = kept if encoder == "joint" else [f"text.encoder={t5_folder}", "text.words=()"]
    config = load_config("configs/t2i_tiny_few.py", [*small, *kept, "distill.teacher=given"])
    mesh, student = sharding.make_mesh(devices=jax.devices()[:1]), build_model(config)
    params, encode = calm(student), loop.frozen_encoder(config, mesh)
    given = {name: x for name, x in params.items() if name != INTERVAL}
    frozen = freeze(config, given, mesh, encode)
    batch = encode(next(loop.device_batches(config, load_source(config), mesh, 0)))
    condition = {name: x[None] for name, x in batch.items() if name not in ("image", "broken")}
    condition["interval"] = jnp.zeros((1, 8))
    keys, clean = jax.random.split(jax.random.key(0), (1, 8)), images.from_uint8(batch["image"])[None]
    packed, layout = objective.corrupt(Cascade(2), 4, clean, condition, keys, 0, 0.0)
    teacher, none = student.clone(intervals=False), make_text_reader(config)([""] * 8)
    none = encode({name: jnp.asarray(x) for name, x in none.items()})
    with_text = {name: x for name, x in packed.condition.items() if name != "interval"}

    @jax.jit
    def targets(params, frozen):
        made = build_distillation(config, student).retarget(
            packed, layout, params, frozen["teacher"], frozen["null"]
        )
        return made, packed_loss(student, params, made, layout)

    @jax.jit
    def velocity(params, condition):
        condition = encode_text(teacher, params, condition)
        return teacher.apply({"params": params}, packed.tokens, packed.timesteps, layout, **condition)

    made, loss = targets(params, frozen)
    halves = [velocity(given, x) for x in ({name: x[None] for name, x in none.items()}, with_text)]
    for target, without, with_text in zip(made.target, *halves, strict=True):
        right = without + config.distill.guidance_scale * (with_text - without)
        np.testing.assert_allclose(target[:, ::2], right[:, ::2], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(halves[0][0]) - np.asarray(halves[1][0])).max() > 1e-3
    assert np.isfinite(loss).all()


def test_a_student_is_no_teacher(student, tmp_path):
    """Catches averages of averages."""
    with pytest.raises(UserError, match="is distilled itself"):
        read_teacher(few(student))


def test_official_weights_teach(teacher, tmp_path):
    """Catches a release that cannot be distilled before it is converted."""
    out = tmp_path / "official"
    convert.main([f"--source={teacher}", "--to=official", f"--out={out}"])
    official = read_teacher(few(out, "cascade.gamma=-0.3333333333333333"))
    jax.tree.map(np.testing.assert_array_equal, official, jax.device_get(read_teacher(few(teacher))))


def test_sampling_a_student(student, tmp_path, capsys):
    """Catches a default that is not the config's, a false count, and a face unlike the command."""
    out, again = tmp_path / "out", tmp_path / "again"
    sample.main([f"--checkpoint={student}", "--labels=1,2,3", f"--out={out}"])
    assert "2 evaluations per image" in capsys.readouterr().out
    made = arrays.read_npz(out / "samples.npz", "arr_0")
    assert (arrays.read_npz(out / "samples.npz", "nfe") == 1).all()
    sample.main([f"--checkpoint={student}", f"--from_png={out / '000001.png'}", f"--out={again}"])
    np.testing.assert_array_equal(arrays.read_npz(again / "samples.npz", "arr_0")[0], made[1])
    model = pf.load(student)
    np.testing.assert_array_equal(model.sample(labels=[1, 2, 3]), made)
    several = model.run(labels=[1], num_steps=[4, 2], init_image=made[0], from_stage=1, strength=0.5)
    assert several.nfe.tolist() == [[1]]
    assert model.run(labels=[1], num_steps=[4, 2]).nfe.tolist() == [[4, 2]]
    assert len({model.sample(labels=[1], num_steps=n).tobytes() for n in (1, 2, 4, 8)}) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--solver=heun"], "solver euler, not heun"),
        (["--solver=dopri5"], "solver euler, not dopri5"),
        (["--step_control=per_image"], "step_control must be fixed"),
        (["--num_steps=3"], "num_steps 1, 2, 4, 8 per stage, not 3,3"),
        (["--grid=reference"], "grid uniform, not reference"),
        (["--shift=2"], "shift 1, not 2"),
        (["--guidance_scale=2.4"], "guidance_scale 0 .its own is built in., not 2.4"),
        (["--negative_labels=3"], "--negative_labels does nothing with a distilled model"),
        (["--init_image=x.png", "--strength=0.5"], "strength must be a multiple of 1"),
    ],
)
def test_what_no_step_has_seen_is_refused(student, tmp_path, flags, said, monkeypatch):
    """Catches images from steps that the student was never trained for."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("x.png")
    with pytest.raises(UserError, match=said):
        sample.main([f"--checkpoint={student}", "--labels=1", "--out=out", *flags])
    assert not (tmp_path / "out").exists()


def test_what_needs_a_velocity_is_refused(student, tmp_path):
    """Catches an inversion, or official weights, of a network that has no velocity."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="--invert needs a velocity"):
        flags = ["--labels=1", f"--invert={tmp_path / 'x.png'}", f"--out={tmp_path / 'out'}"]
        sample.main([f"--checkpoint={student}", *flags])
    with pytest.raises(UserError, match="is distilled, which official weights cannot hold"):
        convert.main([f"--source={student}", "--to=official", f"--out={tmp_path / 'official'}"])
