"""Weights as other programs save them: wrappers, sets, shards, formats."""

import argparse
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.flax import save_file as save_bfloat16
from safetensors.numpy import save_file

from pixelflow_jax import convert
from pixelflow_jax.common import UserError
from pixelflow_jax.foreign.official import from_official, official_names, official_yaml, read_official
from pixelflow_jax.foreign.weights import Leaf, _sets, find, read_state
from pixelflow_jax.models.inception import inception_names

import parity


@pytest.fixture(scope="module")
def official():
    """(state dict, our config) of a recorded case."""
    with np.load(parity.DEFAULT_CASES / "forward_c2i.npz") as case:
        return parity.with_prefix(case, "params/"), parity.case_config(case)


def leaves_of(tree, level=()):
    """What `_walk` gives for nested dicts of tensors."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, (*level, key))
        else:
            yield Leaf(level, tuple(key.split(".")), lambda value=value: value)


STATE = {f"blocks.{i}.{name}": i for i in range(4) for name in ("fc.weight", "fc.bias", "norm.weight")}
KNOWN = STATE.keys().__contains__
WORDS = ["model", "net", "state_dict", "ema", "shadow", "params", "x-1", "0", "weights", "optimizer"]
PREFIX = st.lists(st.sampled_from([*WORDS, "module", "_orig_mod", "ema_model"]), max_size=3)


@given(st.lists(st.sampled_from([*WORDS, "module"]), max_size=3), PREFIX, st.data())
def test_any_depth_and_prefix(level, prefix, data):
    """Catches a way to nest or wrap weights that is not seen through, or a neighbour taken in."""
    infix = data.draw(st.sampled_from(["", "_orig_mod.", "_fsdp_wrapped_module."]))
    wrapped = {
        ".".join([*prefix, name.replace("blocks.1.", f"blocks.1.{infix}")]): x
        for name, x in STATE.items()
    }
    if prefix:  # what stands beside a prefix is not of the weights
        wrapped |= {"n_averaged": 1, "loss.net.weight": 2}
    tree = wrapped
    for name in reversed(level):
        tree = {name: tree, "step": 3, "extra": {"opt.weight": 4}}
    ((label, found),) = _sets(list(leaves_of(tree)), KNOWN).items()
    assert label == (".".join([*level, *prefix]) or ".")
    assert {name: read() for name, read in found.items()} == STATE


def under(prefix, state=STATE):
    return {f"{prefix}.{name}": x for name, x in state.items()}


SEVERAL = [
    ({"model": STATE, "ema": STATE, "opt": {"state": {"0": {"exp_avg": 1}}}}, "ema", "model"),
    ({"state_dict": under("model"), "ema_state": STATE}, "ema_state", "model"),
    ({**under("online_model"), **under("ema_model"), "step": 1}, "ema_model", "online_model"),
    ({"net": STATE, "ema": {"decay": 1, "shadow": STATE}}, "ema.shadow", "net"),
    ({"model": STATE, "model_ema": under("module")}, "model_ema.module", "model"),
]


@pytest.mark.parametrize("tree, auto, other", SEVERAL)
def test_the_average_is_preferred(tree, auto, other, monkeypatch, tmp_path):
    """Catches raw weights in place of the average, and a set that no flag can choose."""
    monkeypatch.setattr("pixelflow_jax.foreign.weights._open", lambda path: leaves_of(tree))
    path = tmp_path / "x.pt"
    values = {name: read() for name, read in find(path, KNOWN).items()}
    assert values == STATE
    assert auto in _sets(list(leaves_of(tree)), KNOWN)
    assert find(path, KNOWN, other).keys() == find(path, KNOWN, auto).keys() == STATE.keys()
    with pytest.raises(UserError, match=f"(?s){auto}.*'best' names none or several.*--weights"):
        find(path, KNOWN, "best")


def test_several_sets_without_an_average(monkeypatch, tmp_path):
    """Catches a choice that nobody made; and an error that does not say what the file holds."""
    trees = {"a": STATE, "b": STATE}
    monkeypatch.setattr("pixelflow_jax.foreign.weights._open", lambda path: leaves_of(trees))
    with pytest.raises(UserError, match="holds these sets of weights: a, b; choose one"):
        find(tmp_path / "x.pt", KNOWN)
    with pytest.raises(UserError, match="no array of this network; it holds a.blocks.0.fc.weight"):
        find(tmp_path / "x.pt", lambda name: False)


def folder_of(tmp_path, config):
    folder = tmp_path / "official"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(official_yaml(config)))  # JSON is YAML
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_bfloat16_in_shards(official, tmp_path, prefix):
    """Catches an index, a dtype or a prefix of safetensors files that is not read; all at once."""
    state, config = official
    folder, names = folder_of(tmp_path, config), sorted(state)
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_bfloat16({prefix + n: jnp.asarray(state[n], jnp.bfloat16) for n in part}, folder / file)
        places |= {prefix + name: file for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    known = official_names(config)
    for source in (folder, index):
        read_official(source, str(folder / "config.yaml"))
    found = read_state(index, known.__contains__)
    assert found.keys() == state.keys() == known
    for name, x in found.items():
        np.testing.assert_array_equal(np.float32(x), np.float32(jnp.asarray(state[name], jnp.bfloat16)))
    for bad in ("../away.safetensors", "none.safetensors", "config.yaml", 3):
        index.write_text(json.dumps({"weight_map": {**places, names[0]: bad}}))
        with pytest.raises(UserError, match="which is no weights file beside it|no weight_map"):
            read_official(folder)


def test_what_is_left_over_comes_first(official):
    """Catches a message full of missing names that hides the one which says what the file is."""
    state, config = official
    renamed = {name.replace("attn1.q", "attn1.query"): x for name, x in state.items()}
    with pytest.raises(UserError, match="config: left over: .*attn1.query.* more; missing: .*attn1.q_"):
        from_official(renamed, config)


def test_inception_by_its_names():
    """Catches a name of Inception's that the reader does not know, or one that it makes up."""
    names = inception_names()
    assert {"fc.weight", "fc.bias", "Mixed_7c.branch_pool.bn.running_var"} <= names
    assert "Mixed_5b.branch1x1.conv.weight" in names and len(names) == 94 * 5 + 2


def test_torch_files(official, tmp_path):
    """Catches a PyTorch program's file that is not read, or is read by running what it holds."""
    torch = pytest.importorskip("torch", reason="torch is the extra `convert`")
    state, config = official
    folder = folder_of(tmp_path, config)
    s = {name: torch.from_numpy(x) for name, x in state.items()}
    args = argparse.Namespace(config="c.yaml", output_dir="exp")
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(2))
    files = {
        "official_train.pt": {"model": {k: v + 1 for k, v in s.items()}, "ema": s, "args": args},
        "compiled.pth": {"_orig_mod." + k: v for k, v in s.items()},
        "lightning.ckpt": {"state_dict": {"model." + k: v for k, v in s.items()}, "epoch": 3},
        "parameters.bin": {k: torch.nn.Parameter(v) for k, v in s.items()},
        "list.pt": [{"net": {"module.model." + k: v for k, v in s.items()}}],
        "ddp_ema.pt": {"n_averaged": torch.tensor(3), **{"module.module." + k: v for k, v in s.items()}},
    }
    for name, tree in files.items():
        torch.save(tree, folder / name)
        read_official(folder / name)
        found = read_state(folder / name, official_names(config).__contains__)
        assert all((found[key] == x).all() for key, x in state.items())
    torch.save({k: v.half() for k, v in s.items()}, folder / "half.pt")
    assert (
        read_state(folder / "half.pt", official_names(config).__contains__)["proj_out_1.bias"].dtype
        == np.float32
    )
    for bad in (Evil(tmp_path / "ran"), {"model": s, "args": pathlib.Path("/tmp/x")}, module):
        torch.save(bad, folder / "bad.pt")
        with pytest.raises(UserError, match="without running code: it holds an object of .*state_dict"):
            read_official(folder / "bad.pt")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_choice_by_flag(official, tmp_path, capsys):
    """Catches --weights that is lost between the command and the reader."""
    state, config = official
    folder = folder_of(tmp_path, config)
    both = {f"raw.{k}": x for k, x in state.items()} | {f"other.{k}": x for k, x in state.items()}
    save_file(both, folder / "model.safetensors")
    with pytest.raises(UserError, match="raw, other|other, raw"):
        convert.main([f"--source={folder}", f"--out={tmp_path / 'ours'}"])
    convert.main([f"--source={folder}", f"--out={tmp_path / 'ours'}", "--weights=raw"])
    assert "Converted" in capsys.readouterr().out
