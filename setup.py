"""Installs configs/ as pixelflow_jax.configs; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pixelflow_jax*"]), "pixelflow_jax.configs"],
    package_dir={"pixelflow_jax.configs": "configs"},
)
