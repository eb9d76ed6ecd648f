"""Trains a PixelFlow, or goes on with a run that was stopped.

    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m pixelflow_jax.train --config=configs/digits.py --workdir=runs/small --config.model.depth=2

Any key of the config can be set with --config.KEY=VALUE. If the workdir holds a run of the same
config, training resumes from its newest checkpoint. A SIGTERM saves and exits with code 75.
"""

import functools
import sys

import jax
from etils import epath
from ml_collections import ConfigDict

from pixelflow_jax.common import cli
from pixelflow_jax.common.errors import EXIT_PREEMPTED, UserError
from pixelflow_jax.distributed.preemption import Preempted
from pixelflow_jax.distributed.watchdog import joined
from pixelflow_jax.foreign.official import read_official
from pixelflow_jax.training.checkpoints import CheckpointFailed, find_step, load_params
from pixelflow_jax.training.loop import train
from pixelflow_jax.training.metrics import TrainingDiverged
from pixelflow_jax.training.start import has_begun


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--config", default="configs/digits.py", help="config file (default: %(default)s)"
    )
    parser.add_argument("--workdir", required=True, help="folder of the run: new, or one to resume")
    args, config = cli.parse_with_config(parser, argv)
    check_init_from(config, args.workdir)
    load_initial = functools.partial(initial_params, config) if config.init_from else None
    try:
        with joined(config.hosts, config=config.to_dict(), workdir=args.workdir) as watch:
            _, report = train(config, args.workdir, load_initial, watch=watch)
    except Preempted as signal:
        print(signal, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except (TrainingDiverged, CheckpointFailed) as error:
        print(f"error: {error}. Checkpoints before it in {args.workdir} are kept", file=sys.stderr)
        sys.exit(1)
    if jax.process_index() == 0:
        print(report)


def check_init_from(config: ConfigDict, workdir: str) -> None:
    """Raises UserError if what a new run is to start from is not there; one that has begun is fine."""
    begun = has_begun(epath.Path(workdir))
    if config.init_from and not begun and not epath.Path(config.init_from).exists():
        raise UserError(f"--config.init_from={config.init_from}: there is no such file or folder")


def initial_params(config: ConfigDict) -> dict:
    """The parameters that `config.init_from` names: a checkpoint of ours, or official weights."""
    path, ours = epath.Path(config.init_from), True
    try:
        find_step(path)
    except UserError:
        ours = False
    try:
        return load_params(path)[0] if ours else read_official(path)[0]
    except UserError as error:
        raise UserError(f"config.init_from={config.init_from} cannot be read: {error}") from None


if __name__ == "__main__":
    cli.run(main)
