"""Errors, files on disk and in buckets, arrays in files, locks, numerics, and what is known of chips.

Code that any room or command may use. Nothing here knows what a PixelFlow model or a run is, and nothing
here imports another room.
"""
