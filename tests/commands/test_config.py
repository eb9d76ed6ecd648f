"""Configs: one check of names, kinds and bounds, by every way in which a value can arrive."""

import json
import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

import pixelflow_jax as pf
from pixelflow_jax import train
from pixelflow_jax.common import UserError, config_keys
from pixelflow_jax.common.removed import Removed
from pixelflow_jax.config import check_config, config_from_dict, default_config, differences, load_config
from pixelflow_jax.data.sources import SOURCES
from pixelflow_jax.models import attention, transformer
from pixelflow_jax.sampling import grids, guidance, solvers

CONFIGS = sorted(p.stem for p in pathlib.Path("configs").glob("*.py") if p.stem != "__init__")
DEFAULT = flatten_dict(default_config().to_dict(), sep=".")


def changed(key, value):
    """The default config with one key set (or added), whatever a ConfigDict thinks of it."""
    values = default_config().to_dict()
    section = values
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = value
    return values


def by_file(tmp_path, key, value):
    path = tmp_path / "config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\nfrom numpy import inf, nan\n"
        f"def get_config():\n    return ConfigDict({changed(key, value)!r})\n"
    )
    return load_config(str(path))


DOORS = {
    "file": by_file,
    "flag": lambda tmp_path, key, value: load_config("digits", [f"{key}={value}"]),
    "json": lambda tmp_path, key, value: config_from_dict(json.loads(json.dumps(changed(key, value)))),
    "fit": lambda tmp_path, key, value: pf.fit(ConfigDict(changed(key, value)), tmp_path / "run"),
    "prepare": lambda tmp_path, key, value: pf.prepare(ConfigDict(changed(key, value))),
}


def wrong_values(key):
    """Values of another kind than the key's, and out of its bounds."""
    default = DEFAULT[key]
    if isinstance(default, bool):
        return ["maybe", 2, None, {}]
    if isinstance(default, str):
        return [["a"], "x\0", {"a": 1}, 3, None] + (["no such"] if key in config_keys.CHOICES else [])
    wrong = ["many", None, {"a": 1}, True, float("nan"), float("inf")]
    if isinstance(default, tuple):
        wrong = [[3] if key == "text.words" else ["many"], [None], [{}], {"a": 1}, None, [True]]
    interval = config_keys.BOUNDS.get(key, "")
    if interval and "(-inf" not in interval:
        low = config_keys._number(interval[1:].partition(",")[0])
        below = low if interval[0] == "(" else low - (1 if type(default) is int else 1e-3)
        wrong.append([below] if isinstance(default, tuple) else below)
    return wrong


@pytest.mark.parametrize("door", DOORS)
def test_no_door_takes_what_cannot_be(door, tmp_path):
    """Catches a value of another kind or out of bounds, or a misspelt key, that some door lets in."""
    enter = DOORS[door]
    for key in list(DEFAULT) if door in ("file", "flag", "json") else ("seed", "optimizer.b1"):
        section, _, leaf = key.rpartition(".")
        wrong = wrong_values(key)
        if door == "flag":  # a flag is text, and any text is one for a key of words
            wrong = ["x\0"] if isinstance(DEFAULT[key], str) else wrong
            wrong += ["no such"] if key in config_keys.CHOICES else []
        for value in wrong:
            with pytest.raises(UserError, match=key.replace(".", r"\.")):
                enter(tmp_path, key, value)
        wrong_names = (f"{key}x", f"{key[:-1]}_", f"{section}x.{leaf}".removeprefix("x."))
        for name in {*wrong_names[: 3 if door == "flag" else 1]} - {key}:
            with pytest.raises(UserError) as error:
                enter(tmp_path, name, 1)
            assert f"{name} is not a key" in str(error.value)
            assert "did you mean config." in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimzer.learning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.dept", "model.depth"),
        ("batchsize", "batch_size"),
        ("data.resolutoin", "data.resolution"),
        ("resolution", "data.resolution"),
    ],
)
def test_the_nearest_key(wrong, right):
    """Catches a hint that leads away: optimizer.b1 looks more like optimizer.lr than what it means."""
    with pytest.raises(UserError, match=f"did you mean config.{right}[?]"):
        load_config("digits", [f"{wrong}=1"])


def test_the_table_is_whole():
    """Catches a new key without bounds, and names of solvers, sources and the like that differ."""
    for key, default in DEFAULT.items():
        entry = default[0] if isinstance(default, tuple) and default else default
        entry = config_keys.ENTRIES.get(key, entry)
        number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
        assert (key in config_keys.BOUNDS) == number, key
    assert config_keys.BOUNDS.keys() | config_keys.CHOICES.keys() <= DEFAULT.keys()
    assert not config_keys.REMOVED.keys() & DEFAULT.keys()
    rooms = {
        "model.remat": transformer.REMAT_POLICIES,
        "data.source": SOURCES,
        "sample.solver": solvers.SOLVERS,
        "sample.step_control": solvers.CONTROLS,
        "sample.grid": grids.KINDS,
        "sample.guidance_schedule": guidance.SCHEDULES,
    }
    for key, names in rooms.items():
        assert config_keys.CHOICES[key] == tuple(names)
    assert {*config_keys.CHOICES["model.attention"]} == {"auto", "splash", *attention.BACKENDS}


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_pass_every_door(name):
    """Catches a check that refuses a config of ours, or changes it on its way through JSON."""
    config = load_config(name)
    assert check_config(config) == config == config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert check_config(FrozenConfigDict(config)) == config
    assert check_config(config.copy_and_resolve_references().lock()) == config


def test_values_of_other_libraries_become_plain():
    """Catches numbers of numpy's that JSON cannot hold, and a whole number where a fraction goes."""
    config = default_config()
    with config.ignore_type():
        config.batch_size, config.optimizer.weight_decay = np.int64(16), np.float32(0.5)
        config.sample.num_steps, config.optimizer.clip_norm = [np.int32(3)], 2
    fitted = check_config(config)
    assert json.dumps(fitted.to_dict())
    assert fitted.sample.num_steps == (3,) and type(fitted.optimizer.clip_norm) is float
    assert type(config.batch_size) is np.int64  # the person's own is left as it is


def test_references_follow_an_override(tmp_path):
    """Catches an override that the keys which refer to it do not see."""
    (tmp_path / "c.py").write_text(
        "from pixelflow_jax.configs.digits import get_config as base\n"
        "def get_config():\n"
        "    config = base()\n"
        "    config.keep_every = config.get_ref('checkpoint_every')\n"
        "    return config.lock()\n"
    )
    assert load_config(str(tmp_path / "c.py"), "checkpoint_every=70").keep_every == 70


BASE = (
    "from pixelflow_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config():\n    return {'a': 1}", "a ConfigDict, not dict"),
        ("def get_config():\n    pass", "a ConfigDict, not NoneType"),
        ("def get_config(name):\n    pass", "missing 1 required positional argument"),
        ("get_config = 3", "not callable"),
        ("import sys\nsys.exit(0)", "failed: SystemExit"),
        ("def get_config():\n    return get_config()", "failed: RecursionError"),
        ("\0", "failed: "),
        (BASE + "    del config.hosts\n    return config", "hosts.heartbeat_timeout is missing"),
        (BASE + "    config.hosts = 3\n    return config", "Could not override field 'hosts'"),
        (BASE + "    del config.seed\n    return config", "config.seed is missing"),
        (BASE + "    config.more = config\n    return config", "config.more.* is not a key"),
        (BASE + "    config.model.depth = 'x'\n    return config", "depth"),
        (
            BASE + "    from ml_collections import config_dict as c\n"
            "    config.data.path = c.required_placeholder(str)\n    return config",
            "reference without a value",
        ),
        (
            BASE + "    config.optimizer.lr = 1e-3\n    return config",
            "mean config.optimizer.learning_rate",
        ),
    ],
)
def test_files_that_are_no_configs(tmp_path, text, message):
    """Catches a traceback, or exit code 0, for what a person's file may do; and a run that begins."""
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=message):
        train.main([f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_removed_keys(monkeypatch):
    """Catches an old checkpoint that a removed key spoils, and a file that keeps one unseen."""
    monkeypatch.setitem(config_keys.REMOVED, "model.rope", Removed(True, "every model has it"))
    for value, reasons in ((True, []), (False, ["model.rope=False, which was removed"])):
        values = changed("model.rope", value)
        assert config_from_dict(values) == default_config()
        assert differences(default_config(), values) == reasons
    with pytest.raises(UserError, match="config.model.rope was removed: every model has it"):
        check_config(ConfigDict(values))
    with pytest.raises(UserError, match="model.rope was removed"):
        load_config("digits", ["model.rope=true"])


def test_old_runs_load():
    """Catches a run of before some key was there that cannot be read any more."""
    for key in DEFAULT:
        section, _, leaf = key.rpartition(".")
        values = changed(key, None)
        del (values[section] if section else values)[leaf]
        assert config_from_dict(values) == default_config()


@pytest.mark.parametrize("key", config_keys.PATHS)
def test_home(key, monkeypatch, tmp_path):
    """Catches a folder named "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("digits", [f"{key}=~/x"]) == load_config("digits", [f"{key}={tmp_path}/x"])
    with pytest.raises(UserError, match="is no user's folder"):
        load_config("digits", [f"{key}=~nobody-here/x"])
