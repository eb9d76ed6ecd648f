"""What the commands share: a parser that teaches, and errors for people."""

import argparse
import glob
import importlib.util
import logging
import os
import sys
from collections.abc import Callable

from pixelflow_jax.errors import UserError


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


# What tells that this process is one of several, by who sets it. JAX finds out the rest.
CLUSTER_SIGNS = {
    "JAX_COORDINATOR_ADDRESS": lambda value: bool(value),  # set by hand, or by launch/local.sh
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,  # a Cloud TPU pod, or GKE
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: bool(value),  # several TPU slices
    "SLURM_STEP_NUM_TASKS": lambda value: value.isdigit() and int(value) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda value: value.isdigit() and int(value) > 1,
}


def connect_cluster() -> None:
    """Joins the other processes of a run, if there are any; must come before other JAX calls.

    Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID to start processes by hand.

    Raises:
      UserError: if some of these are set but not all, or the others cannot be found.
    """
    signs = [name for name, test in CLUSTER_SIGNS.items() if test(os.environ.get(name, ""))]
    if not signs and not _on_tpu_vm():
        return
    import jax

    by_hand = {}
    for name, flag in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        if flag in os.environ:
            if not os.environ[flag].isdigit():
                raise UserError(f"{flag}={os.environ[flag]!r} must be a whole number")
            by_hand[name] = int(os.environ[flag])
    try:
        jax.distributed.initialize(**by_hand)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if signs or jax.process_count() > 1:
            found = f"{signs[0]} is set" if signs else "this TPU VM is one of several"
            raise UserError(f"{found}, but the other processes were not found: {reason}") from None
    if jax.process_index():
        logging.getLogger("pixelflow_jax").setLevel(logging.ERROR)  # one voice is enough


def _on_tpu_vm() -> bool:
    """Whether TPU chips are plugged in here; on Google Cloud the metadata server knows the rest."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def run(main: Callable[[], None]) -> None:
    """Runs a command: bad input is one line on stderr and exit code 2, without a traceback."""
    for name in ("absl", "asyncio"):  # Orbax logs tracebacks there of what we report in a sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes files."""
    import jax

    return jax.process_index() == 0
