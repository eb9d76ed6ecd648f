"""Images of several sizes: buckets, the order of batches, and training on them."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from pixelflow_jax.common import UserError
from pixelflow_jax.config import load_config
from pixelflow_jax.data.base import Scan
from pixelflow_jax.data.buckets import BucketOrder, bucket_sizes, read_sizes
from pixelflow_jax.data.loader import make_batches
from pixelflow_jax.data.sources import load_source
from pixelflow_jax.data.transforms import center_crop, nearest_size, random_crop
from pixelflow_jax.training import loop, objective, step

FLAGS = (
    *("model.num_heads=2", "model.head_dim=8", "model.depth=2", "model.context_dim=16"),
    *("text.num_layers=1", "batch_size=8", "num_train_steps=8", "log_every=1", "checkpoint_every=4"),
    *(
        "model.scan_unroll=1",
        "sample_every=0",
        "data.resolution=24",
        "data.max_aspect_ratio=2",
        "data.bucket_unit=8",
    ),
)


@pytest.fixture
def config():
    return load_config("configs/t2i_tiny.py", FLAGS)


def test_bucket_sizes(config):
    """Catches sizes that are larger than the square, that no patch divides, or of one orientation."""
    assert bucket_sizes(config.data) == ((24, 24), (16, 32), (32, 16))
    data = load_config("configs/t2i_1024.py", ("data.max_aspect_ratio=2.5",)).data
    sizes = bucket_sizes(data)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1344, 768), (640, 1600)} <= set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and 0.8 * 1024**2 <= height * width <= 1024**2
        assert max(height, width) / min(height, width) <= 2.5
    data.max_aspect_ratio = 1.0
    assert bucket_sizes(data) == ((1024, 1024),)
    assert nearest_size(sizes, 300, 400) == (896, 1152) and nearest_size(sizes, 9, 1) == (1600, 640)


def test_bad_buckets():
    """Catches sizes that would fail in the middle of a run."""
    for flags, match in (
        (["data.max_aspect_ratio=0.5"], "at least 1"),
        (["data.max_aspect_ratio=2.0", "data.bucket_unit=12"], "multiple of 8"),
    ):
        with pytest.raises(UserError, match=match):
            load_config("configs/t2i_tiny.py", flags)
    with pytest.raises(UserError, match="no bucket has the 8 images"):
        BucketOrder(np.full((7, 2), 16), ((16, 16),), 8, 0)


def test_order_of_buckets():
    """Catches a batch of two sizes, an image in the wrong bucket, twice in an epoch, or in none."""
    rng, sizes = np.random.default_rng(0), ((16, 16), (8, 24), (24, 8), (8, 32))
    shapes = np.array([(50, 50), (40, 100), (100, 40)])[rng.integers(3, size=100)]
    shapes[7] = (10, 1000)  # alone in its bucket
    order = BucketOrder(shapes, sizes, 8, 3)
    again = pickle.loads(pickle.dumps(order))
    assert order.sizes == sizes[:3]
    epoch, seen = sum((shapes == s).all(1).sum() // 8 for s in ((50, 50), (100, 40))), []
    epoch += ((shapes == (40, 100)).all(1).sum() + 1) // 8
    for batch in range(3 * int(epoch)):
        entries = [order[8 * batch + i] for i in range(8)]
        assert entries == [again[8 * batch + i] for i in range(8)]
        assert len({size for _, size in entries}) == 1
        for index, (size,) in entries:
            assert size == ((8, 24) if index == 7 else nearest_size(sizes[:3], *shapes[index]))
        seen.append([index for index, _ in entries])
    epochs = [np.concatenate(seen[i * epoch : (i + 1) * epoch]) for i in range(3)]
    assert all(len(set(x.tolist())) == len(x) for x in epochs)
    assert set(np.concatenate(epochs).tolist()) > set(epochs[0].tolist())  # others stay out each time
    assert seen[:epoch] != seen[epoch : 2 * epoch]


@pytest.mark.parametrize("size", [(24, 16), (16, 40)])
def test_crops_that_are_not_square(size):
    """Catches height and width exchanged, and a crop that shows other than the image."""
    rows, columns = np.mgrid[:120, :90]
    image = Image.fromarray(np.stack([2 * rows, 2 * columns, rows * 0], axis=-1).astype(np.uint8))
    for crop in (random_crop(image, size, np.random.default_rng(0)), center_crop(image, size)):
        pixels = np.asarray(crop).astype(float)
        assert pixels.shape == (*size, 3)
        down, across = np.diff(pixels[..., 0], axis=0), np.diff(pixels[..., 1], axis=1)
        np.testing.assert_allclose(down.mean(), across.mean(), rtol=0.1)  # not stretched
        assert down.mean() > 0 and across.mean() > 0
    center = np.asarray(center_crop(image, size)).astype(float)
    np.testing.assert_allclose(center.mean(axis=(0, 1))[:2], [119, 89], atol=3)


def test_sizes_are_read_once(config, tmp_path):
    """Catches a scan at every start, one of other data, and sizes that are not the images'."""
    source = load_source(config)
    few = type("Few", (), {"__len__": lambda self: 30, "__getitem__": lambda self, i: source[i]})()
    sizes = read_sizes(few, Scan(tmp_path))
    assert [tuple(s) for s in sizes.tolist()] == [source[i][0].shape[:2] for i in range(30)]
    assert len(set(map(tuple, sizes.tolist()))) == 3
    silent = type("Silent", (), {"__len__": lambda self: 30})()
    np.testing.assert_array_equal(read_sizes(silent, Scan(tmp_path)), sizes)


@pytest.mark.slow
def test_training_on_several_sizes(config, tmp_path, monkeypatch):
    """Catches a recompilation a step, and a run that sees other data after it is resumed."""
    monkeypatch.setattr("pixelflow_jax.data.captioned_digits.LENGTH", 200)
    traces, original = [], objective.corrupt
    monkeypatch.setattr(objective, "corrupt", lambda *args: traces.append(1) or original(*args))
    loop.train(config, tmp_path)
    assert len(traces) == 3  # once per size
    rows = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    loop.train(config, tmp_path)
    resumed = (tmp_path / "metrics.jsonl").read_text()
    losses = [[json.loads(row)["loss"] for row in text.splitlines()] for text in (rows, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_batches_have_the_shapes_that_are_compiled_ahead(config):
    """Catches a key, shape or dtype of a batch that compile_check does not know."""
    config.data.max_aspect_ratio = 1.0
    batch = next(make_batches(load_source(config), config))
    abstract = step.abstract_batch(config, loop.sharding.make_mesh(devices=jax.devices()[:1]))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in abstract.items()
    }
