"""Train a PixelFlow, or resume a run.

    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/small --config.model.depth=2

Set any key of the config with --config.KEY=VALUE. If the workdir holds a run of the same config,
training resumes from its newest checkpoint. A SIGTERM saves a checkpoint and exits with code 75.
"""

import sys

import jax

from pixelflow_jax.common import cli
from pixelflow_jax.config import parse_flags
from pixelflow_jax.distributed.preemption import EXIT_PREEMPTED, Preempted
from pixelflow_jax.distributed.watchdog import joined
from pixelflow_jax.training.checkpoints import CheckpointFailed
from pixelflow_jax.training.loop import train
from pixelflow_jax.training.metrics import TrainingDiverged
from pixelflow_jax.training.start import check_init_from


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", default="configs/digits.py", help="config file (default: %(default)s)"
    )
    parser.add_argument("--workdir", required=True, help="folder of a new run, or of the run to resume")
    args, config = parse_flags(parser, argv)
    check_init_from(config, args.workdir)
    try:
        with joined(config.hosts, config=config.to_dict(), workdir=args.workdir) as watch:
            _, report = train(config, args.workdir, watch=watch)
    except Preempted as signal:
        print(signal, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except (TrainingDiverged, CheckpointFailed) as error:
        print(f"error: {error}. Checkpoints before it in {args.workdir} are kept", file=sys.stderr)
        sys.exit(1)
    if jax.process_index() == 0:
        print(report)


if __name__ == "__main__":
    cli.run(main)
