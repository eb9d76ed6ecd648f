"""Judging samples: reference statistics, FID, sFID, Inception Score, precision and recall, sweeps.

Code that makes images does not belong here (see sampling/ and requests/).
"""
