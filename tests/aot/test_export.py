"""The train and the sample step, lowered for GPUs that are not here."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from pixelflow_jax.config import build_model
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.sampling.generate import build_sampler, make_generate
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.step import abstract_batch, abstract_state, make_train_step


@pytest.fixture(params=["float32", "bfloat16"])
def config(request, tiny_config):
    tiny_config.dtype = request.param
    return tiny_config


def test_the_train_step_exports_for_cuda(config):
    """Catches an operation that exists on CPU or TPU only, such as a kernel without its other door."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, optimizer = build_model(config), build_optimizer(config)
    state = abstract_state(config, model, optimizer, mesh)
    step = make_train_step(config, model, optimizer, mesh)
    exported = jax.export.export(step, platforms=["cuda"])(state, abstract_batch(config, mesh))
    assert exported.platforms == ("cuda",) and "dot_general" in exported.mlir_module()


@pytest.mark.parametrize(
    "config", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_the_sample_step_exports_for_cuda(config, solver):
    """Catches the same in the whole cascade of a sampler."""
    config.sample.solver = solver
    params = abstract_params(build_model(config))
    generate = make_generate(build_sampler(config))
    inputs = {"index": jax.ShapeDtypeStruct((4,), jnp.int32)}
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    exported = jax.export.export(generate, platforms=["cuda"])(
        params, inputs, {"labels": labels}, {"labels": labels}
    )
    assert exported.platforms == ("cuda",) and exported.out_avals[0].shape == (4, 16, 16, 3)
