"""The optimizer chain: gradient clipping, AdamW or Muon, averages of the parameters (EMA)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from pixelflow_jax.distributed import sharding


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return clip -> AdamW or Muon -> EMA as one; its state is a dict with these names."""
    opt = config.optimizer
    return optax.named_chain(
        ("clip", clip_by_global_norm(opt.clip_norm) if opt.clip_norm else optax.identity()),
        (opt.name, {"adamw": _adamw, "muon": _muon}[opt.name](config)),
        ("ema", params_ema(ema_decays(config), config.ema.warmup)),
    )


def _adamw(config: ConfigDict) -> optax.GradientTransformation:
    opt = config.optimizer
    mask = is_matrix if opt.weight_decay_on == "matrices" else None
    rate, decay = build_schedule(config, opt.learning_rate), opt.weight_decay
    return optax.adamw(rate, opt.b1, opt.b2, opt.eps, weight_decay=decay, mask=mask)


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Return Muon for the blocks' matrices, and AdamW (with Nesterov momentum) for the rest.

    Source: https://kellerjordan.github.io/posts/muon, by Optax.
    """
    opt = config.optimizer
    return optax.contrib.muon(
        build_schedule(config, opt.muon_learning_rate),
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        adam_b1=opt.b1,
        adam_b2=opt.b2,
        adam_weight_decay=opt.weight_decay if opt.weight_decay_on == "all" else 0.0,
        adam_learning_rate=build_schedule(config, opt.learning_rate),
        muon_weight_dimension_numbers=block_matrices,
    )


def block_matrices(params: dict) -> dict:
    """Return the axes [in, out] of each matrix of the blocks [depth, in, out]; None for other leaves."""

    def one(path, leaf):
        mine = path[0].key == sharding.SCANNED and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if mine else None

    return jax.tree_util.tree_map_with_path(one, params)


def build_schedule(config: ConfigDict, peak: float) -> optax.Schedule:
    """Return a rate by step: linear warmup to `peak`, then constant or decaying to 0 at the end."""
    opt = config.optimizer
    steps = max(config.num_train_steps - opt.warmup_steps, 1)
    main = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, steps),
        "linear": optax.linear_schedule(peak, 0.0, steps),
    }[opt.schedule]
    if not opt.warmup_steps:
        return main
    # The first step has a nonzero rate, 1/warmup_steps of the full one.
    warmup = optax.linear_schedule(peak / opt.warmup_steps, peak, max(opt.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, main], [opt.warmup_steps])


def is_matrix(params: dict) -> dict:
    """Mark the leaves that weight decay applies to: matrices, not biases, norms or embeddings."""

    def one(path, leaf):
        names = [entry.key for entry in path]
        stacked = sharding.SCANNED in names
        return leaf.ndim - stacked >= 2 and names[-1] != "embedding"

    return jax.tree_util.tree_map_with_path(one, params)


def ema_decays(config: ConfigDict) -> list[float]:
    """Return the decay of every average: `ema.decays`, then those of `ema.half_lives` (in images)."""
    by_half_life = [0.5 ** (config.batch_size / images) for images in config.ema.half_lives]
    return [*config.ema.decays, *by_half_life]


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)) as torch does; Optax omits the 1e-6."""

    def update(updates, state, params=None):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class ParamsEmaState(NamedTuple):
    """Averages of the parameters, one per decay, in float32, and the number of updates so far."""

    averages: list
    count: Array


def params_ema(decays: Sequence[float], warmup: bool = False) -> optax.GradientTransformation:
    """Average the parameters after each update; must be the last transformation of a chain.

    average <- decay * average + (1 - decay) * (params + updates), starting at the initial parameters.
    With `warmup`, update t = 0, 1, ... uses min(decay, (1 + t) / (10 + t)), so that the initial
    parameters do not dominate the average of a short run.
    """

    def init(params):
        def copy(p):  # the step donates its buffers, which must not be shared
            return jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True)

        averages = [jax.tree.map(copy, params) for _ in decays]
        return ParamsEmaState(averages, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        new = optax.apply_updates(params, updates)

        def step(decay, average):
            if warmup:
                decay = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
            return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, new)

        averages = [step(*pair) for pair in zip(decays, state.averages, strict=True)]
        return updates, ParamsEmaState(averages, state.count + 1)

    return optax.GradientTransformation(init, update)
