"""A config's train step and sampler as programs with abstract arguments, for any devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pixelflow_jax.aot.compiler import Program
from pixelflow_jax.cascade.packing import cascade_layout
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_cascade, build_model, check_batch_size
from pixelflow_jax.distributed import sharding
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.flops import forward_flops
from pixelflow_jax.sampling.generate import build_sampler, image_mesh, make_generate
from pixelflow_jax.sampling.solvers import evaluations_per_step
from pixelflow_jax.training import step
from pixelflow_jax.training.distillation import build_distillation
from pixelflow_jax.training.optimizer import build_optimizer
from pixelflow_jax.training.teacher import abstract_frozen


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a train step costs: `images`, `tokens` and `flops` of the global batch, over `devices`."""

    images: int
    tokens: int
    flops: float  # forward and backward
    devices: int


def workload(config: ConfigDict, mesh: Mesh) -> Workload:
    """Return what a train step of `config` costs."""
    cascade, model = build_cascade(config), build_model(config)
    counts = dict.fromkeys(range(cascade.num_stages), config.batch_size // cascade.num_stages)
    size = config.data.resolution
    layout = cascade_layout(cascade, counts, size, size, model.patch_size)
    flops = 3 * forward_flops(model, layout, config.text.max_length)
    if config.distill.teacher:
        flops += build_distillation(config, model).target_flops(layout, config.text.max_length)
    return Workload(config.batch_size, layout.row_length, flops, mesh.size)


def train_program(config: ConfigDict, devices: list) -> Program:
    """Return the train step on `devices`. Raises UserError if the batch does not split over them."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.context)
    check_batch_size(config, sharding.batch_shards(mesh))
    model, optimizer = build_model(config), build_optimizer(config)
    arguments = step.abstract_state(config, model, optimizer, mesh), step.abstract_batch(config, mesh)
    if config.distill.teacher or config.lora.rank:
        arguments += (abstract_frozen(config, mesh),)
    function = step.make_train_step(config, model, optimizer, mesh)
    return Program(function, arguments, mesh, workload(config, mesh).flops, "train")


def sample_program(config: ConfigDict, devices: list) -> Program:
    """Return the sampler on `devices`, as `sample` runs it: every device holds all parameters.

    Raises UserError if the batch does not split over them, or the steps depend on the images.
    """
    sampler, mesh = build_sampler(config), image_mesh(devices, config.mesh.context)
    if sampler.control != "fixed":
        raise UserError(
            f"the steps of {sampler.solver} depend on the images, and so does their cost: add "
            f"--config.sample.step_control=fixed"
        )
    size = config.batch_size
    if size % mesh.shape["images"]:
        raise UserError(f"{size} images do not split over {mesh.shape['images']} groups of chips")

    def placed(tree, spec):
        where = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    params = placed(abstract_params(sampler.model), P())
    inputs = placed({"index": jax.ShapeDtypeStruct((size,), jnp.int32)}, P("images"))
    condition = placed(step.abstract_condition(config, size), P("images"))
    steps = np.array(sampler.grid.steps(sampler.cascade.num_stages))
    one = sampler.stage_flops(config.text.max_length)
    flops = float(steps * evaluations_per_step(sampler.solver) @ one) * size
    arguments = params, inputs, condition, condition
    return Program(make_generate(sampler, mesh=mesh), arguments, mesh, flops, "sample")


PROGRAMS = {"train": train_program, "sample": sample_program}
