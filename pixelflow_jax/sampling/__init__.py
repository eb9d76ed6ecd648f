"""From noise to images: time grids, guidance, solvers, starts, and the coarse-to-fine sampler.

New solvers go into solvers.py. Flags, prompts and output folders do not belong here (see requests/).
"""
