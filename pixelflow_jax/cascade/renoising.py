"""The step between two stages: upsample, rescale, and add noise correlated within 2x2 blocks.

Source: PixelFlow (arXiv 2504.07963), section 3.3. After the step, mean and variance are those at the
start of the next stage's window; `Cascade.renoising` gives the two coefficients.
"""

from jaxtyping import Array, Float

from pixelflow_jax.cascade import images
from pixelflow_jax.cascade.stages import Cascade


def correlate_blocks(z: Float[Array, "b h w c"], gamma: float) -> Float[Array, "b h w c"]:
    """Turn white noise into noise with covariance (1 - gamma) I + gamma 11^T within each 2x2 block.

    The covariance has the eigenvalue 1 + 3 gamma along the block's mean and 1 - gamma orthogonal to it,
    so at gamma = -1/3 the mean vanishes: sqrt(4/3) (z - blockmean(z)).
    """
    mean = images.up(images.down(z))
    return (1 - gamma) ** 0.5 * (z - mean) + max(1 + 3 * gamma, 0.0) ** 0.5 * mean


def step_up(
    cascade: Cascade, stage: int, x: Float[Array, "b h w c"], block: Float[Array, "b h2 w2 c"]
) -> Float[Array, "b h2 w2 c"]:
    """Return alpha Up(x) + beta n, the start of `stage`; x is the end of the stage before."""
    alpha, beta = cascade.renoising(stage)
    return alpha * images.up(x) + beta * block


def step_down(
    cascade: Cascade, stage: int, x: Float[Array, "b h2 w2 c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h2 w2 c"]]:
    """Return (y, n) with step_up(y, n) = x: the inverse for noise whose blocks sum to zero.

    As Down(n) = 0, y is Down(x) / alpha, and n the rest.
    """
    alpha, beta = cascade.renoising(stage)
    coarse = images.down(x)
    return coarse / alpha, (x - images.up(coarse)) / beta
