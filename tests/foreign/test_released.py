"""Official weights wherever a checkpoint is named: found, downloaded, and converted once."""

import http.server
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import pixelflow_jax as pf
from pixelflow_jax import convert, sample, train
from pixelflow_jax.common import UserError
from pixelflow_jax.config import build_model, load_config
from pixelflow_jax.foreign import released
from pixelflow_jax.requests.conditions import class_numbers
from pixelflow_jax.training.checkpoints import load_params, save_params

from conftest import TINY, calm


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixelflow_jax" / "converted"


@pytest.fixture
def folders(tmp_path):
    """(A checkpoint, the same as official weights)."""
    config = load_config("configs/digits.py", [*TINY, "model.num_classes=1000"])
    save_params(tmp_path / "ours", calm(build_model(config)), config)
    convert.main([f"--source={tmp_path / 'ours'}", "--to=official", f"--out={tmp_path / 'official'}"])
    return tmp_path / "ours", tmp_path / "official"


FLAGS = ["--labels=3", "--num_images=2", "--num_steps=2", "--guidance_scale=2", "--height=16"]
FLAGS += ["--width=16", "--guidance_schedule=constant"]


def pixels(checkpoint, out):
    sample.main([f"--checkpoint={checkpoint}", f"--out={out}", *FLAGS])
    return np.load(out / "samples.npz")["arr_0"]


def test_an_official_folder_is_a_checkpoint(folders, tmp_path, cache, monkeypatch, capsys):
    """Catches other pixels than the checkpoint's, and a second conversion."""
    ours, official = folders
    expected = pixels(ours, tmp_path / "a")
    np.testing.assert_array_equal(pixels(official, tmp_path / "b"), expected)
    (place,) = cache.iterdir()
    assert f"converted now, once: {place}" in capsys.readouterr().err

    def again(*args):
        raise AssertionError("converted twice")

    monkeypatch.setattr(released, "read_official", again)
    np.testing.assert_array_equal(pixels(official / "model.safetensors", tmp_path / "c"), expected)
    names = pf.load(official).classes
    assert names[207] == "golden retriever" and len(names) == 1000
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    params, config, _ = load_params(ours)
    save_params(tmp_path / "new", jax.tree.map(lambda x: 0.5 * x, params), config)
    shutil.rmtree(official)
    convert.main([f"--source={tmp_path / 'new'}", "--to=official", f"--out={official}"])
    assert (pixels(official, tmp_path / "d") != expected).any()  # other files: converted anew
    assert len(list(cache.iterdir())) == 2


def test_a_broken_conversion_is_never_used(folders, tmp_path, cache, monkeypatch):
    """Catches a cache entry that is half there after a full disk or a kill."""
    ours, official = folders

    def full(folder, *args):
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        released.converted(official, full)
    assert not list(cache.iterdir())
    old = cache / "part-old"
    old.mkdir()
    os.utime(old, (0, 0))
    data = (official / "model.safetensors").read_bytes()
    (official / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read|is not"):
        load_params(official)
    assert not list(cache.iterdir())
    (official / "model.safetensors").write_bytes(data)
    load_params(official)
    assert len(list(cache.iterdir())) == 1


def test_a_run_may_begin_from_official_weights(folders, tmp_path):
    """Catches init_from that needs a conversion by hand."""
    _, official = folders
    flags = [f"--config.{entry}" for entry in [*TINY, "model.num_classes=1000"]]
    flags += [f"--config.init_from={official}", f"--workdir={tmp_path / 'run'}"]
    train.main(["--config=configs/digits.py", *flags])
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


def test_names_of_classes():
    """Catches synonyms that are not understood, and names of several classes that are taken."""
    names = released.class_names(load_config("imagenet256_xl"))
    names = {int(number): name for number, name in names.items()}
    asked = ["golden retriever", "Tinca tinca", "tench", "tench, Tinca tinca", 5]
    assert class_numbers("labels", asked, names, 1000) == [207, 0, 0, 0, 5]
    with pytest.raises(UserError, match=r"\[134, 517\] are all called 'crane'"):
        class_numbers("labels", ["crane"], names, 1000)
    with pytest.raises(UserError, match="golden retriever"):
        class_numbers("labels", ["golden retreiver"], names, 1000)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that its client asks for; `files` of one repository."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/some/model/tree/"):
            found = [{"type": "file", "path": x, "size": len(y)} for x, y in self.files.items()]
            body = json.dumps([x | {"oid": "b" * 40} for x in found]).encode()
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "some/model", "sha": "a" * 40, "siblings": siblings}).encode()
        else:
            body = self.files.get(path.rpartition("/")[2]) if "/resolve/" in path else None
        self.send_response(200 if body is not None else 404)
        body = body or b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folders, tmp_path):
    """A hub on 127.0.0.1, and a function that runs `sample` with it."""
    ours, official = folders
    Hub.files = {path.name: path.read_bytes() for path in official.iterdir()} | {"big.bin": b"x"}
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(pathlib.Path(__file__).parent.parent.parent)

    def run(name, out):
        command = [sys.executable, "-m", "pixelflow_jax.sample", f"--checkpoint={name}", f"--out={out}"]
        return subprocess.run([*command, *FLAGS], env=env, cwd=tmp_path, capture_output=True, text=True)

    yield run
    server.shutdown()


@pytest.mark.slow
def test_a_hub_id_is_a_checkpoint(hub, folders, tmp_path):
    """Catches a download of more than is needed, or of what the user does not name; a bare error."""
    made = hub("some/model", tmp_path / "b")
    assert made.returncode == 0, made.stderr
    expected = pixels(folders[0], tmp_path / "a")
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "samples.npz")["arr_0"], expected)
    fetched = {line.rpartition("/")[2] for line in Hub.asked if "/resolve/" in line}
    assert fetched == {"config.yaml", "model.safetensors"}

    missing = hub("no/such", tmp_path / "c")
    assert missing.returncode == 2 and "no/such" in missing.stderr and len(missing.stderr) < 500
    (tmp_path / "runs").mkdir()
    Hub.asked.clear()
    typo = hub("runs/digitz", tmp_path / "c")
    assert typo.returncode == 2 and "there is no such folder" in typo.stderr and not Hub.asked

    Hub.files = {"config.yaml": Hub.files["config.yaml"], "model.pt": b"x" * 1000}
    Hub.asked.clear()
    torch = hub("some/model", tmp_path / "d")
    if importlib.util.find_spec("torch") is None:
        assert torch.returncode == 2 and "convert" in torch.stderr
        assert not any("model.pt" in line for line in Hub.asked)
