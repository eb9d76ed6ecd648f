"""Trains a PixelFlow, or goes on with a run that was stopped.

    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/small --config.model.depth=2

Any key of the config can be set with --config.KEY=VALUE. If the workdir holds a run of the same
config, training resumes from its newest checkpoint.
"""

import sys

from pixelflow_jax import cli
from pixelflow_jax.config import load_config
from pixelflow_jax.training.loop import train
from pixelflow_jax.training.metrics import TrainingDiverged


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", default="configs/digits.py", help="config file (default: %(default)s)"
    )
    parser.add_argument("--workdir", required=True, help="folder of the run: new, or one to resume")
    argv = sys.argv[1:] if argv is None else argv
    overrides = [arg.removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    args = parser.parse_args([arg for arg in argv if not arg.startswith("--config.")])
    config = load_config(args.config, overrides)
    try:
        _, report = train(config, args.workdir)
    except TrainingDiverged as error:
        print(f"error: {error}. The last checkpoint in {args.workdir} is kept", file=sys.stderr)
        sys.exit(1)
    print(report)


if __name__ == "__main__":
    cli.run(main)
