"""Parameters from arrays under the names and in the layout of public PyTorch checkpoints."""

from collections.abc import Iterable

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pixelflow_jax.common import UserError, listed

# (our path, layer of stacked blocks or None, public name) of every array of a network
Names = list[tuple[tuple[str, ...], int | None, str]]


def public_view(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Return a view of one of our arrays with PyTorch's order of axes: outputs of a kernel first."""
    if not path[-1].endswith("kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def public_params(
    read, there: Iterable[str], names: Names, shapes, what, says="", view=public_view, dtype=np.float32
) -> dict:
    """Return our parameters from a public checkpoint.

    Args:
      read: returns an array by its public name. Arrays are read one at a time, so that a large file is
        never in memory twice.
      there, names: the names of the arrays in the checkpoint, and those to read.
      shapes: our parameters, for their shapes.
      what, says: for errors: what does not fit, and what tells the right shape.
      view: returns a view of our array in the public layout, see `public_view`.

    Raises UserError, which names arrays that are missing, left over or of the wrong shape.
    """
    there, shapes, misshapen = dict.fromkeys(there), flatten_dict(shapes), []
    flat = {path: np.empty(shapes[path].shape, dtype) for path, _, _ in names}
    for path, layer, name in names:
        if name in there:
            ours = view(path, flat[path][... if layer is None else layer])
            theirs = np.asarray(read(name))
            if theirs.shape == ours.shape:
                ours[...] = theirs
            else:
                expected = f", {says} {ours.shape}" if says else ""
                misshapen.append(f"{name} has shape {theirs.shape}{expected}")
    known = {name: None for _, _, name in names}
    left, missing = [x for x in there if x not in known], [x for x in known if x not in there]
    found = ("", misshapen), ("left over: ", left), ("missing: ", missing)
    problems = [kind + listed(which, 4) for kind, which in found if which]
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")
    return unflatten_dict(flat)
