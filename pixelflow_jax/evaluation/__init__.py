"""Judging samples: image sets, features, statistics in float64, the metrics."""
