"""Flax modules: the PixelFlow transformer and its attention, T5, Inception; FLOPs from shapes.

A module takes arrays and returns arrays. It does not read files, and does not draw training noise.
"""
