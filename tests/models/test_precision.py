"""float32 that is float32 on every chip: what the programs ask of products and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import Cascade
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.inception import Inception
from pixelflow_jax.models.t5 import T5Encoder
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.sampling import generate
from pixelflow_jax.sampling.adaptive import solve_adaptive
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.sampling.grids import TimeGrid
from pixelflow_jax.sampling.sampler import Sampler, class_conditions
from pixelflow_jax.sampling.solvers import SOLVERS, WITHOUT_ERROR
from pixelflow_jax.sampling.starts import FromSeed
from pixelflow_jax.training import step
from pixelflow_jax.training.programs import train_program
from pixelflow_jax.training.step import abstract_condition

from tiny_t5 import T5

WIDE = {jnp.dtype("float32"), jnp.dtype("float64")}
SETTINGS = ("model.depth=1", "batch_size=8", "sample.num_steps=2")


def inner(value):
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [found for item in value for found in inner(item)] if isinstance(value, (list, tuple)) else []


def products(jaxpr):
    """(operand dtypes, precision) of every product and convolution, those of loops and kernels too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            yield {x.aval.dtype for x in eqn.invars[:2]}, eqn.params["precision"]
        for value in eqn.params.values():
            for found in inner(value):
                yield from products(found)


def check(jaxpr, some_wide: bool = True) -> None:
    """That products of float32 have the highest precision; and whether there are any."""
    highest = (jax.lax.Precision.HIGHEST,) * 2
    wide = [precision for dtypes, precision in products(jaxpr.jaxpr) if dtypes & WIDE]
    assert bool(wide) == some_wide and all(precision == highest for precision in wide)


@pytest.fixture(params=["tpu v5e", *(pytest.param(p, marks=pytest.mark.slow) for p in ("cpu", "gpu"))])
def platform(request, monkeypatch):
    """What the programs believe to be traced for."""
    for module in (step, generate):
        monkeypatch.setattr(module, "platform_of", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("name, size", [("t2i_tiny", 16), ("digits", 32)])
def test_float32_training_is_float32(name, size, platform):
    """Catches a product of the default precision, forward or backward, in any backend of attention."""
    overrides = (*SETTINGS, f"data.resolution={size}", "cascade.num_stages=2", "model.patch_size=2")
    config = load_config(f"configs/{name}.py", [*overrides, "model.remat=full"])
    program, arguments, *_ = train_program(config, jax.devices()[:1])
    check(program.trace(*arguments).jaxpr)


@pytest.mark.parametrize(
    "name, trained, dtype", [("digits", "bfloat16", "float32"), ("t2i_tiny", "float32", None)]
)
def test_float32_sampling_is_float32(name, trained, dtype, platform):
    """Catches --dtype=float32 that is a float32 of bfloat16 products, with and without error control."""
    config = load_config(f"configs/{name}.py", [*SETTINGS, f"dtype={trained}"])
    for solver in ("euler", "dopri5"):
        config.sample.solver = solver
        sampler = build_sampler(config, dtype=dtype)
        params = abstract_params(sampler.model)
        condition = abstract_condition(config, 2)
        arguments = params, {"index": jax.ShapeDtypeStruct((2,), jnp.int32)}, condition, condition
        mesh = generate.image_mesh(jax.devices()[:1])
        check(make_generate(sampler, mesh=mesh).trace(*arguments).jaxpr)


def test_the_switch_of_the_environment_does_not_count():
    """Catches JAX_DEFAULT_MATMUL_PRECISION that makes float32 bfloat16, or bfloat16 slow."""
    config = load_config("configs/digits.py", SETTINGS)
    for asked in ("bfloat16", "highest"):
        for dtype in ("float32", "bfloat16"):
            with jax.default_matmul_precision(asked):
                model = build_model(config, dtype)
                params = abstract_params(model)
                sampler = build_sampler(config, dtype=dtype)
                index = jax.ShapeDtypeStruct((2,), jnp.int32)
                arguments = params, {"index": index}, {"labels": index}, {"labels": index}
                traced = make_generate(sampler).trace(*arguments).jaxpr
            if dtype == "float32":
                check(traced)
            else:
                assert all(p != (jax.lax.Precision.HIGHEST,) * 2 for _, p in products(traced.jaxpr))


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in WITHOUT_ERROR])
def test_solvers_add_up_in_float32(solver):
    """Catches slopes that are weighed in bfloat16, of any model: Diffrax does it by products."""
    x = jax.ShapeDtypeStruct((4, 4, 3), jnp.float32)
    check(jax.make_jaxpr(lambda x: solve_adaptive(solver, lambda x, tau: -x, x, 1e-3, 1e-6))(x))


def test_networks_that_judge_or_encode_are_float32():
    """Catches features of Inception, and states of a float32 T5, that differ between chips."""
    pixels = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
    params = jax.eval_shape(Inception().init, jax.random.key(0), pixels)
    check(jax.make_jaxpr(Inception().apply)(params, pixels))

    ids, mask = (jax.ShapeDtypeStruct((2, 5), dtype) for dtype in (jnp.int32, bool))
    params = jax.eval_shape(T5Encoder(T5).init, jax.random.key(0), ids, mask)
    check(jax.make_jaxpr(T5Encoder(T5).apply)(params, ids, mask))
    check(jax.make_jaxpr(T5Encoder(T5, jnp.bfloat16).apply)(params, ids, mask), some_wide=False)


def test_weights_are_cast_once(noisy_params):
    """Catches weights that each layer of each evaluation converts anew, and a cast that changes them."""
    model = PixelFlow(2, 8, 2, 2, num_classes=10, dtype=jnp.bfloat16)
    sampler = Sampler(model, Cascade(2), 16, 16, TimeGrid((3,)))
    params, start = noisy_params(model), FromSeed(0)
    given = start.inputs(np.arange(2)), *class_conditions(np.array([1, 2], np.int32), 10)
    matrices = {x.shape[-2:] for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3}

    def converted(jaxpr, looping=False):
        """Return how many matrices of the blocks are converted within loops."""
        found = 0
        for eqn in jaxpr.eqns:
            inside = looping or eqn.primitive.name in ("while", "scan")
            parts = [part for value in eqn.params.values() for part in inner(value)]
            found += sum(converted(part, inside) for part in parts)
            shape = getattr(eqn.invars[0].aval, "shape", ()) if eqn.invars else ()
            is_cast = eqn.primitive.name == "convert_element_type" and shape in matrices
            found += looping and is_cast and eqn.outvars[0].aval.dtype == jnp.bfloat16
        return found

    def run(params, inputs, *conditions):
        return sampler.run(params, start.noise(sampler, inputs), *conditions).ends[-1]

    generate = make_generate(sampler, start)
    assert converted(jax.make_jaxpr(run)(params, *given).jaxpr) > 0  # what the check would see
    assert converted(jax.make_jaxpr(generate)(params, *given).jaxpr) == 0
    plain = images.to_uint8(jax.jit(run)(params, *given)).astype(int)
    assert np.abs(np.asarray(generate(params, *given).pixels) - plain).max() <= 1
