"""The objective, optimizer, train step, checkpoints, metrics, how a run starts, and the loop.

Reading data (see data/) and drawing samples (see sampling/) do not belong here.
"""
