"""Conversion: bit for bit there and back, every key accounted for, every file kind."""

import json
import pathlib

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from pixelflow_jax import convert
from pixelflow_jax.common import UserError
from pixelflow_jax.config import load_config
from pixelflow_jax.foreign import official as official_room
from pixelflow_jax.models.conditioning import abstract_params
from pixelflow_jax.models.transformer import PixelFlow
from pixelflow_jax.training.checkpoints import load_params

import parity


def official(name):
    """(state dict, our config) of a recorded case."""
    with np.load(parity.DEFAULT_CASES / f"{name}.npz") as case:
        return parity.with_prefix(case, "params/"), parity.case_config(case)


def write_folder(folder: pathlib.Path, state, config, kind="safetensors"):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(official_room.official_yaml(config)))
    path = folder / f"model.{kind}"
    np.savez(path, **state) if kind == "npz" else save_file(state, path)
    return folder


@pytest.mark.parametrize("name", ["forward_c2i", "forward_t2i"])
def test_there_and_back_is_bit_identical(name):
    """Catches an array that is transposed twice, cast, or forgotten."""
    state, config = official(name)
    params = official_room.from_official(state, config)
    back = official_room.to_official(params, config)
    assert back.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)
    expected = abstract_params(PixelFlow(**config.model))
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, expected)


def test_another_gamma_is_not_lost():
    """Catches an official checkpoint that would be renoised otherwise than it was trained."""
    config = official("forward_c2i")[1]
    config.cascade.gamma = -0.2
    with pytest.raises(UserError, match="cascade.gamma -1/3, not -0.2"):
        official_room.official_yaml(config)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_the_command_goes_there_and_back(tmp_path, kind, capsys):
    """Catches a difference between the files and what was converted in memory."""
    state, config = official("forward_c2i")
    source = write_folder(tmp_path / "official", state, config, kind)
    convert.main([f"--source={source}", f"--out={tmp_path / 'ours'}"])
    _, loaded, meta = load_params(tmp_path / "ours")
    assert loaded.model == config.model and meta["ema"] == 0
    back = tmp_path / "back"
    convert.main([f"--source={tmp_path / 'ours'}", "--to=official", f"--out={back}"])
    again = load_file(back / "model.safetensors")
    assert again.keys() == state.keys()
    assert all((again[key] == array).all() for key, array in state.items())
    assert yaml.safe_load((back / "config.yaml").read_text())["model"]["params"]["depth"] == 2
    assert "Converted" in capsys.readouterr().out


def test_torch_files(tmp_path):
    """Catches .pt files read with pickle's full power, and training checkpoints (model and ema)."""
    torch = pytest.importorskip("torch", reason="torch is the extra `convert`")
    state, config = official("forward_c2i")
    source = write_folder(tmp_path / "official", state, config)
    (source / "model.safetensors").unlink()
    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    torch.save({"model": {k: v + 1 for k, v in tensors.items()}, "ema": tensors}, source / "model.pt")
    convert.main([f"--source={source}", f"--out={tmp_path / 'ours'}"])
    params, _, _ = load_params(tmp_path / "ours")
    back = official_room.to_official(jax.device_get(params), config)
    assert all((back[key] == array).all() for key, array in state.items())
    torch.save(pathlib.Path("/tmp/x"), source / "model.pt")  # an object, which only pickle could make
    with pytest.raises(UserError, match="cannot be read"):
        convert.main([f"--source={source}", f"--out={tmp_path / 'other'}"])


def test_every_problem_of_a_state_dict_is_named():
    """Catches a conversion that ignores what it does not know."""
    state, config = official("forward_c2i")
    del state["proj_out_1.bias"]
    state["extra"] = np.zeros(3, np.float32)
    state["transformer_blocks.1.mlp.fc1.weight"] = np.zeros((3, 4), np.float32)
    with pytest.raises(UserError) as error:
        official_room.from_official(state, config)
    for part in ("missing: proj_out_1.bias", "left over: extra", "fc1.weight has shape (3, 4)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("model: 3", "not an official config"), ("{]", "is not YAML"), ("{}", "not an official config")],
)
def test_bad_config_yaml(tmp_path, content, message):
    """Catches a traceback for a damaged config.yaml."""
    state, config = official("forward_c2i")
    source = write_folder(tmp_path / "official", state, config)
    (source / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        convert.main([f"--source={source}", f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "ours").exists()


def test_bad_weights_files(tmp_path):
    """Catches a traceback, or a half-written output, for weights that are not what they say."""
    state, config = official("forward_c2i")
    source = write_folder(tmp_path / "official", state, config)
    for name in ("model.safetensors", "model.npz", "model.txt"):
        (source / "model.safetensors").unlink(missing_ok=True)
        (source / name).write_bytes(b"not weights")
        with pytest.raises(UserError):
            convert.main([f"--source={source / name}", f"--out={tmp_path / 'ours'}"])
        (source / name).unlink()
    with pytest.raises(UserError, match="is not a folder"):
        convert.main([f"--source={tmp_path / 'nothing'}", f"--out={tmp_path / 'ours'}"])
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "millions"), [("imagenet256_xl", 677), ("t2i_xl", 882), ("imagenet256_b", 131)]
)
def test_released_sizes(name, millions):
    """Catches a config that is not the released network: its parameter count is published."""
    config = load_config(f"configs/{name}.py")
    shapes = abstract_params(PixelFlow(**config.model))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    assert json.dumps(config.to_dict())


def test_hub_ids(tmp_path, monkeypatch):
    """Catches a hub id that is not asked for, a download of more than is needed, and a bare error."""
    import huggingface_hub

    asked = {}

    def download(name, **patterns):
        asked[name] = patterns
        if name == "no/such":
            raise OSError("404: not there")
        return str(tmp_path / "official")

    state, config = official("forward_t2i")
    write_folder(tmp_path / "official", state, config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert.main(["--source=some/model", f"--out={tmp_path / 'ours'}"])
    assert load_params(tmp_path / "ours")[1].model == config.model
    assert "config.yaml" in asked["some/model"]["allow_patterns"]
    with pytest.raises(UserError, match="no/such is neither a folder nor on the hub: 404"):
        convert.main(["--source=no/such", f"--out={tmp_path / 'none'}"])
