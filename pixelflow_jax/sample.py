"""Generate images from a checkpoint.

    python -m pixelflow_jax.sample --checkpoint=runs/digits --out=samples
    python -m pixelflow_jax.sample --checkpoint=runs/digits --labels=3,7 --num_images=20 --out=sevens
    python -m pixelflow_jax.sample --checkpoint=runs/t2i_tiny --prompt="a small red six" --out=six
    python -m pixelflow_jax.sample --checkpoint=xl --num_images=50000 --solver=dopri5 --out=fifty

Writes samples.npz (arr_0: uint8 [N, H, W, 3], as ADM's evaluator reads; labels; nfe: network evaluations
per image and stage), 000000.png ... (all up to 1000 images, else the first 100), grid.png and
settings.json. Image i depends on the seed, its number and its label, not on batch, devices or hosts. All
devices and hosts take part. A folder that holds files is refused, unless its settings.json equals the
request: then it is completed.

Each PNG file carries its settings; `--from_png=FILE` makes it again.

Other starts than the noise of --seed:

    --init_image=cat.png --from_stage=2 --strength=0.7     variations of an image
    --init_image=small.png --from_stage=2                  upscaling, of an image of stage 1's size
    --init_image=cat.png --mask=mask.png                   what is white in the mask is drawn anew
    --invert=cat.png --labels=3                            an image's noise, and back again with
    --from_noise=OUT/noise.npz                             the noise.npz that --invert wrote
    --interpolate=3,4                                      from one seed's noise to another's
"""

import dataclasses
import sys

import jax

from pixelflow_jax.common import cli
from pixelflow_jax.config import default_config
from pixelflow_jax.distributed.watchdog import joined
from pixelflow_jax.requests import run
from pixelflow_jax.requests.job import NotFinite
from pixelflow_jax.requests.request import parse


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    request = parse(__doc__, sys.argv[1:] if argv is None else argv)
    with joined(default_config().hosts, patient=True, flags=dataclasses.asdict(request)) as watch:
        try:
            report = run.invert(request) if request.invert else run.sample(request, watch)[0]
        except NotFinite as error:
            sys.exit(f"error: {error}. What was finished before is kept in --out={request.out}")
    if jax.process_index() == 0:
        print(report)


if __name__ == "__main__":
    cli.run(main)
