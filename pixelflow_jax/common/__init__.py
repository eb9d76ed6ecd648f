"""Errors, files on disk and in buckets, arrays in files, locks, numerics, and what is known of chips.

Any room or command may use this. Code that knows what a model or a run is does not belong here.
"""
