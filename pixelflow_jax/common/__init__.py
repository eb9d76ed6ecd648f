"""Errors, files here and in buckets, arrays in files, claims of folders, numerics, and facts on chips.

Any room or command may use this. Code that knows what a model or a run is does not belong here.
"""

import logging

from pixelflow_jax.common.errors import Explained, Lost, UserError, blame, listed, optional, sentence

log = logging.getLogger("pixelflow_jax")
__all__ = ["Explained", "Lost", "UserError", "blame", "listed", "log", "optional", "sentence"]
