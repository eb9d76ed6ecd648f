"""Sampling: time grids, guidance, solvers, and the coarse-to-fine sampler that joins them."""
