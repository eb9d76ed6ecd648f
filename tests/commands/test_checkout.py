"""A checkout whose dependencies are installed, but which is not installed itself."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pixelflow_jax as pf

HERE = pathlib.Path(__file__).parents[2]
# Hides the installed package: its metadata, and the finder of an editable install.
HIDE = """
import importlib.metadata, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
known = importlib.metadata.Distribution.from_name
def from_name(name):
    if name.replace("-", "_").lower() == "pixelflow_jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.Distribution.from_name = from_name
"""


def in_checkout(code, *argv):
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code, *argv],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_checkout_that_is_not_installed(trained, tmp_path):
    """Catches a command, a config or a version that only an installed package has."""
    code = """
import pixelflow_jax as pf
from pixelflow_jax.configs.digits import get_config
from pixelflow_jax import doctor
assert pf.load_config("digits") == pf.load_config("configs/digits.py") == get_config()
assert pf.load_config("t2i_512").data.resolution == 512
print(doctor.check_versions())
made = pf.load(sys.argv[1]).run(num_images=1, num_steps=1)
print(made.settings[0]["versions"]["pixelflow_jax"])
"""
    assert in_checkout(code, str(trained)).splitlines()[-1] == pf.__version__


def test_the_version_has_one_place():
    """Catches a second place for the version, and a version that can only be read with JAX."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pixelflow_jax.__version__"}
    code = "import pixelflow_jax\nprint(pixelflow_jax.__version__, 'jax' in sys.modules)"
    assert in_checkout(code).split() == [pf.__version__, "False"]
