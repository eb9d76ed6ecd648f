"""Weights that other projects wrote: reading files that are not trusted, the official network's layout.

Our own checkpoints do not belong here (see training/).
"""
