"""The method: stages and their times, the noise between stages, corruption, images, packed rows.

First plain numbers, then functions of arrays. Networks, solvers and optimizers do not belong here.
"""
