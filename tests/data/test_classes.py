"""Classes by name, and the data that a run goes on with."""

import io
import json
import logging
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import pixelflow_jax as pf
from pixelflow_jax import pack
from pixelflow_jax.common import UserError
from pixelflow_jax.config import default_config, load_config
from pixelflow_jax.data.sources import class_names, load_source
from pixelflow_jax.demo import Demo
from pixelflow_jax.requests import request
from pixelflow_jax.requests.conditions import class_numbers, trained_classes
from pixelflow_jax.requests.job import prepare
from pixelflow_jax.requests.request import as_flag, labels
from pixelflow_jax.training.loop import grid_conditions, train
from pixelflow_jax.training.start import (
    CONFIG,
    DATA,
    check_same_data,
    claimed_workdir,
    data_of,
    holds_run,
)

from conftest import TINY

NAMES = ("10", "9", 'a, "b"', "big dog", "cat", "leer")  # as class folders sort; the last is empty


def claim(workdir, config, data) -> bool:
    """Takes a workdir for a moment; whether there was a run."""
    with claimed_workdir(workdir, config, data) as (there, _):
        return there


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of awkward names, and one without images."""
    root = tmp_path_factory.mktemp("classes") / "data"
    for place, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for i in range(0 if name == "leer" else 2):
            (root / name / f"{i}.png").write_bytes(png(10 * place + i))
    return root


def config_of(path, source="folder", **model):
    flags = [f"data.source={source}", f"data.path={path}", "data.crop=none"]
    flags += [f"model.{name}={value}" for name, value in model.items()]
    return load_config("configs/digits.py", [*TINY, *flags])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run on them, of a model with more classes."""
    workdir = tmp_path_factory.mktemp("classes") / "run"
    config = config_of(folder, depth=1)
    config.num_train_steps = config.checkpoint_every = 1
    train(config, workdir)
    return workdir


ASKED = st.integers(-9, 10**17), st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1)


@given(st.lists(st.one_of(*ASKED), min_size=1))
@example(['a, "b"', 3, "3", " x ", '"'])
def test_lists_of_classes_come_back(asked):
    """Catches a name that a comma, a quote or a blank takes apart, and a name that becomes a number."""
    assert list(labels(as_flag(asked))) == asked


@pytest.mark.parametrize("text", ["", ",", "3,", ",3", "3,,4", '"a', '"a"b', 'a"b"', '""'])
def test_lists_that_are_none(text):
    """Catches a slip that becomes a class."""
    with pytest.raises(Exception, match="expected numbers or names"):
        labels(text)


def test_numbers_of_classes(capsys):
    """Catches a name that means another class, and an error that does not help."""
    names = dict(enumerate(NAMES[:-1]))
    assert class_numbers("labels", [4, "cat", "CAT", "10", 'a, "b"', 7], names, 8) == [4, 4, 4, 0, 2, 7]
    assert class_numbers("labels", ["3"], {}, 8) == [3]
    assert "note" not in capsys.readouterr().err
    assert class_numbers("labels", [9], names, 20) == [9]
    assert "note" not in capsys.readouterr().err
    assert class_numbers("labels", [1], {0: "1", 1: "0"}, 2) == [1]
    assert "the class '0' by its number" in capsys.readouterr().err
    for asked, known, match in (
        (["cta"], names, "no class is called 'cta'; near are \"cat\""),
        (["cat"], {}, "keeps no names"),
        ([8], names, "8 is not a class; they are 0 to 7"),
        (["-1"], names, "no class is called"),
        (["99"], names, "99 is not a class"),
        (["dog"], {0: "dog", 3: "dog"}, r"\[0, 3\] are all called"),
        (["DOG"], {0: "dog", 3: "Dog"}, r"\[0, 3\] are all called"),
    ):
        with pytest.raises(UserError, match=match):
            class_numbers("labels", asked, known, 8)


def test_names_are_kept_and_asked_for(run):
    """Catches names that a checkpoint does not keep, and default labels that no step has seen."""
    model = pf.load(run / "checkpoints" / "1")
    assert model.classes == dict(enumerate(NAMES[:-1]))
    made = model.run(labels=["cat", 4, "10", 'a, "b"'], num_images=4)
    assert [one["labels"] for one in made.settings] == [[4], [4], [0], [2]]
    cats = [model.sample(labels=asked, num_images=4) for asked in ("cat", 4, np.array([4]))]
    assert (cats[0] == cats[1]).all() and (cats[0] == cats[2]).all()
    flags = [f"--checkpoint={run}", "--out=x"]
    job = prepare(request.parse("", flags))
    assert job.conditions.extra["labels"].tolist() == [i % 5 for i in range(10)]
    flags += ['--labels="9",big dog', "--negative_labels=cat"]
    kept = prepare(request.parse("", flags)).settings
    assert kept["labels"] == [1, 3] and kept["negative_labels"] == [4]
    demo = Demo(model, None)
    assert demo._labels() == {f"{i}: {name}": str(i) for i, name in enumerate(NAMES[:-1])}
    shutil.rmtree(demo.folder)
    with pytest.raises(UserError, match="near are"):
        model.sample(labels=["bigdog"])


@pytest.mark.parametrize("kept", [None, [1], {"x": "a", "-1": "b", "99": "c", "1.5": "d"}, {"0": 5}])
def test_names_of_strange_checkpoints(kept):
    """Catches a traceback, or a label that no class has, from a checkpoint of anywhere."""
    assert set(trained_classes({"classes": kept}, 10)) <= {0}


@pytest.mark.filterwarnings("ignore:class folder")
def test_fewer_classes_than_the_model(folder, caplog):
    """Catches classes that are never trained, without a word, and a grid of them."""
    config = config_of(folder)
    with caplog.at_level(logging.WARNING):
        source = load_source(config)
    assert "examples of 5 classes, config.model.num_classes is 10: 5 are never trained" in caplog.text
    assert source.num_classes == 6 and class_names(source) == dict(enumerate(NAMES[:-1]))
    condition, null = grid_conditions(config, source, np.arange(7))
    assert condition["labels"].tolist() == [0, 1, 2, 3, 4, 0, 1] and set(null["labels"]) == {10}


@pytest.mark.filterwarnings("ignore:class folder")
def test_packed_shards_keep_the_names(folder, tmp_path):
    """Catches names and gaps among the classes that are lost on the way into shards."""
    pack.main([f"--path={folder}", f"--out={tmp_path / 'packed'}"])
    source = load_source(config_of(tmp_path / "packed", "array_record"))
    assert class_names(source) == dict(enumerate(NAMES[:-1]))


def moved(folder, tmp_path, source: str) -> tuple[pathlib.Path, pathlib.Path]:
    """A data set of a kind, and its copy elsewhere."""
    first = tmp_path / "first"
    if source == "array_record":
        pack.main([f"--path={folder}", f"--out={first}"])
    elif source == "idx":
        first.mkdir()
        images = np.random.default_rng(0).integers(0, 256, (6, 16, 16), np.uint8)
        for kind, x in (("images", images), ("labels", np.arange(6, dtype=np.uint8))):
            head = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes()
            (first / f"train-{kind}-idx{x.ndim}-ubyte").write_bytes(head + x.tobytes())
    elif source in ("caption_folder", "webdataset"):
        first.mkdir()
        for i in range(3):
            (first / f"{i}.png").write_bytes(png(i))
            (first / f"{i}.txt").write_text("a")
        if source == "webdataset":
            files = sorted(str(path) for path in first.iterdir())
            with tarfile.open(first / "a.tar", "w") as tar:
                for name in files:
                    tar.add(name, pathlib.Path(name).name)
    else:
        shutil.copytree(folder, first)
    return first, pathlib.Path(shutil.copytree(first, tmp_path / "deep" / "second"))


def change(root, source: str) -> None:
    """Makes it another data set with as many examples."""
    if source == "folder":
        (root / "cat" / "0.png").rename(root / "cat" / "00.png")
    elif source == "caption_folder":
        (root / "2.png").rename(root / "3.png")
        (root / "2.txt").rename(root / "3.txt")
    elif source == "webdataset":
        (root / "a.tar").rename(root / "b.tar")
    elif source == "idx":
        path = root / "train-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    else:
        path = next(root.glob("*.array_record"))
        path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.filterwarnings("ignore:class folder")
@pytest.mark.parametrize("source", ["folder", "array_record", "idx", "caption_folder", "webdataset"])
def test_data_may_move_but_not_change(folder, tmp_path, source):
    """Catches a run that cannot be resumed as its data were remounted, or goes on with others."""
    first, second = moved(folder, tmp_path, source)
    text = {"context_dim": 8, "num_classes": 0} if source in ("caption_folder", "webdataset") else {}
    config, again = config_of(first, source, **text), config_of(second, source, **text)
    workdir, data = tmp_path / "run", data_of(load_source(config))
    assert not claim(workdir, config, data)
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    assert data_of(load_source(again)) == data and claim(workdir, again, data)
    assert json.loads((workdir / CONFIG).read_text())["data"]["path"] == str(second)
    change(second, source)
    if source != "array_record":  # whose reader sees that itself, or does not
        other = data_of(load_source(again))
        with pytest.raises(UserError, match="holds a run on other data .*: as many examples, but"):
            check_same_data(workdir, other)
    (workdir / DATA).unlink()  # a run of before
    check_same_data(workdir, {**data, "examples": 5})


@pytest.mark.filterwarnings("ignore:class folder")
def test_what_differs_is_said(folder, tmp_path):
    """Catches a refusal that does not say why, and one of a run that has taken no step yet."""
    config, root = config_of(folder), shutil.copytree(folder, tmp_path / "data")
    claim(tmp_path / "run", config, data_of(load_source(config)))
    (root / "cat").rename(root / "cow")
    (root / "9" / "2.png").write_bytes(png())
    data = data_of(load_source(config_of(root)))
    (tmp_path / "run" / "image_sizes.npy").write_bytes(b"those of other images")
    assert claim(tmp_path / "run", config, data)
    assert not (tmp_path / "run" / "image_sizes.npy").exists()
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    data = data_of(load_source(config))
    with pytest.raises(UserError, match="10 examples, it had 11; class 4 is cat, it was cow"):
        claim(tmp_path / "run", config, data)
    other = config_of(folder)
    other.data.split = "val"
    with pytest.raises(UserError, match="data.split: 'val', was 'train'"):
        holds_run(tmp_path / "run", other)
    (tmp_path / "run" / DATA).write_text("[]")
    with pytest.raises(UserError, match="does not say"):
        claim(tmp_path / "run", config, data)


def test_flat_folder_trains_a_model_without_classes(tmp_path, caplog):
    """Catches a flat folder that only a model with classes could take; and images beside folders."""
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    config = default_config()
    config.model.num_classes = 0
    config.data.update(source="folder", path=str(tmp_path))
    source = load_source(config)
    assert len(source) == 9 and class_names(source) == {0: "0"}
    assert grid_conditions(config, source, np.arange(3))[0]["labels"].tolist() == [0, 0, 0]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png())
    with caplog.at_level(logging.WARNING):
        assert len(load_source(config)) == 1
    assert "9 images are in no class folder" in caplog.text
