"""Data: every source, broken files, the transforms, and an order that the seed alone decides."""

import gzip
import io
import itertools
import logging
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from pixelflow_jax import pack
from pixelflow_jax.common import UserError
from pixelflow_jax.config import default_config, load_config
from pixelflow_jax.data.broken import BrokenImages
from pixelflow_jax.data.loader import make_batches, make_examples
from pixelflow_jax.data.sources import class_names, load_source, readable_captions
from pixelflow_jax.data.transforms import BrokenImage, center_crop, decode, random_crop, transform


def data_config(source, path="", resolution=16, **data):
    config = default_config()
    config.model.num_classes = 0
    config.batch_size = 8
    config.data.update(source=source, path=str(path), resolution=resolution, **data)
    return config


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width=40, height=30, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 10 images of several sizes, and one class without any."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            image = picture(24 + i, 50 - 2 * i, 10 * label + i)
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(encoded(image, "JPEG"))
    (tmp_path / "images" / "empty").mkdir()
    return tmp_path / "images"


def take(config, count, first=0, rows=None):
    batches = make_batches(load_source(config), config, first, rows)
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (33, 200), (9, 9), (257, 31)])
def test_random_crop_is_a_crop_of_pillows_lanczos(size):
    """Catches a box off by a fraction of a pixel; the whole resized image is the oracle."""
    image = picture(*size)
    for seed in range(5):
        ours = np.asarray(random_crop(image, (16, 16), np.random.default_rng(seed)), int)
        short = 18  # 1.125 * 16
        scale = short / min(size)
        new = tuple(short if s == min(size) else int(s * scale) for s in size)
        whole = np.asarray(image.resize(new, Image.LANCZOS), int)
        errors = [
            np.abs(ours - whole[top : top + 16, left : left + 16]).max()
            for top in range(new[1] - 15)
            for left in range(new[0] - 15)
        ]
        assert min(errors) <= 1


def test_center_crop_is_adms():
    """Catches another filter or rounding than guided-diffusion's, on a size it halves twice."""
    image = picture(150, 90)
    half = image.resize((75, 45), Image.BOX)
    expected = half.resize((round(75 * 24 / 45), 24), Image.BICUBIC).crop((8, 0, 32, 24))
    np.testing.assert_array_equal(np.asarray(center_crop(image, (24, 24))), np.asarray(expected))
    assert center_crop(picture(1, 3000), (16, 16)).size == (16, 16)  # and no terabyte on the way


def test_odd_images_decode():
    """Catches modes that convert() gets wrong: 16-bit clips, CMYK, palettes, animations."""
    wide = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert np.asarray(decode(encoded(wide, "PNG"))).tolist() == [[[128] * 3] * 4] * 4
    cmyk = picture().convert("CMYK")
    rgb = np.asarray(decode(encoded(cmyk, "JPEG", quality=95)), int)
    assert np.abs(rgb - np.asarray(picture(), int)).mean() < 6
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(animated))[0, 0].tolist() == [255, 0, 0]
    one_pixel = encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    pixels = transform(one_pixel, [(16, 16)], "random", False, np.random.default_rng(0))
    assert pixels.shape == (16, 16, 3) and (pixels == [9, 8, 7]).all()
    assert decode(encoded(picture().convert("P"), "PNG")).mode == "RGB"
    for broken in (
        b"",
        b"a text file",
        encoded(picture(), "JPEG")[:200],
        encoded(picture(), "PNG")[:99],
    ):
        with pytest.raises(BrokenImage):
            decode(broken)


def test_folder_is_laid_out_as_imagefolder(folder, caplog):
    """Catches other classes or another order than torchvision's, and a silent empty class."""
    source = load_source(data_config("folder", folder))
    assert "empty holds no images" in caplog.text
    assert source.classes == ["cat", "dog", "empty"] and len(source) == 20
    assert source.name(0).endswith("cat/0.jpg") and source.name(19).endswith("dog/9.jpg")
    assert [source[i][1] for i in (0, 9, 10, 19)] == [0, 0, 1, 1]
    shutil.copytree(folder, folder.parent / "splits" / "val")
    splits = data_config("folder", folder.parent / "splits", split="val")
    assert load_source(splits).classes == source.classes
    with pytest.raises(UserError, match="there is no .*/train"):
        load_source(splits, "train")
    with pytest.raises(UserError, match="not a folder"):
        load_source(data_config("folder", folder / "nowhere"))
    flat = data_config("folder", folder / "cat")
    assert len(load_source(flat)) == 10 and load_source(flat)[9][1] == 0
    flat.model.num_classes = 5
    with pytest.raises(UserError, match="no class folders"):
        load_source(flat)
    with pytest.raises(UserError, match="no class folders"):
        load_source(data_config("folder", folder / "empty"))


@pytest.mark.filterwarnings("ignore:class folder")
def test_order_does_not_depend_on_hosts_threads_or_workers(folder):
    """Catches data order tied to the number of hosts (maxtext#1760) or of workers."""
    config = data_config("folder", folder)
    whole = take(config, 6)
    for config.data.num_threads, config.data.prefetch in ((1, 1), (3, 8)):
        for a, b in zip(whole, take(config, 6), strict=True):
            np.testing.assert_array_equal(a["image"], b["image"])
    config.data.num_workers = 2
    parts = [take(config, 4, first=2, rows=rows) for rows in (np.arange(0, 8, 2), np.arange(1, 8, 2))]
    for a, even, odd in zip(whole[2:], *parts, strict=True):
        for name in ("image", "labels", "broken"):
            np.testing.assert_array_equal(a[name][::2], even[name])
            np.testing.assert_array_equal(a[name][1::2], odd[name])


def test_every_epoch_visits_every_example_once():
    """Catches dropped or doubled examples, and epochs in the same order."""
    source = load_source(data_config("digits", crop="none", flip=False))
    seen = []
    config = data_config("digits", crop="none", flip=False)

    class Spy:
        num_classes = 10

        def __len__(self):
            return 50

        def __getitem__(self, index):
            seen.append(index)
            return source[index]

    examples = make_examples(Spy(), config)
    for position in range(100):
        examples[position]
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50)) and seen[:50] != seen[50:]


@pytest.mark.filterwarnings("ignore:class folder")
def test_crops_and_flips_change_from_epoch_to_epoch(folder):
    """Catches an augmentation drawn once for ever; the same position always gives the same pixels."""
    config = data_config("folder", folder)
    source = load_source(config)
    examples = make_examples(source, config)
    epochs = [{bytes(examples[20 * e + i]["image"]) for i in range(20)} for e in range(2)]
    assert len(epochs[0] & epochs[1]) < 5
    np.testing.assert_array_equal(examples[33]["image"], make_examples(source, config)[33]["image"])


@pytest.mark.filterwarnings("ignore:class folder")
def test_broken_images_are_named_replaced_and_limited(folder, caplog):
    """Catches a run that dies of one bad file, or trains on without a word when most are bad."""
    (folder / "cat" / "3.jpg").write_text("not a picture")
    (folder / "dog" / "4.jpg").write_bytes((folder / "dog" / "4.jpg").read_bytes()[:300])
    config = data_config("folder", folder, max_broken_share=0.2)
    source, batches = load_source(config), take(config, 5)
    broken = np.concatenate([batch["broken"] for batch in batches])
    assert sorted(set(broken.tolist())) == [-1, 3, 14]
    assert all(batch["image"].std() > 0 for batch in batches)
    np.testing.assert_array_equal(
        np.stack([b["image"] for b in batches]), np.stack([b["image"] for b in take(config, 5)])
    )
    with caplog.at_level(logging.WARNING):
        BrokenImages(source, config.data).add(broken)
    assert "cat/3.jpg" in caplog.text and "dog/4.jpg" in caplog.text
    shutil.rmtree(folder)  # the whole folder goes away while training
    gone = np.concatenate([b["broken"] for b in itertools.islice(make_batches(source, config), 2)])
    with pytest.raises(UserError, match=r"16 of 16 images could not be read.*\n.*No such file"):
        BrokenImages(source, config.data).add(gone)


def write_idx(path, array, zipped):
    data = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    data += array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    """Catches a misread header, padding on the wrong side, and damaged files that pass."""
    rng, suffix = np.random.default_rng(0), ".gz" if zipped else ""
    images, labels = rng.integers(0, 256, (12, 10, 8)), np.arange(12) % 3
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{suffix}", images, zipped)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{suffix}", labels, zipped)
    config = data_config("idx", tmp_path, crop="none", flip=False)
    source = load_source(config, "test")
    assert source.images.shape == (12, 16, 16, 3) and source.num_classes == 3
    np.testing.assert_array_equal(source.images[5, 3:13, 4:12, 1], images[5])
    assert source.images[:, :3].max() == 0 and source.images[..., 12:, :].max() == 0
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged|cannot be read"):
        load_source(config)
    path.unlink()
    with pytest.raises(UserError, match="holds no train-images"):
        load_source(config)


@pytest.mark.filterwarnings("ignore:class folder")
def test_packed_records_equal_the_folder_and_go_on(folder, tmp_path, capsys):
    """Catches a label or image off by one, and a second start that packs anew or mixes sources."""
    out = tmp_path / "packed"
    flags = [f"--path={folder}", f"--out={out}", "--shard_size=6"]
    pack.main(flags)
    assert "4 shards written" in capsys.readouterr().out
    config = data_config("array_record", out)
    records, images = load_source(config), load_source(data_config("folder", folder))
    assert [records[i] for i in range(20)] == [images[i] for i in range(20)]
    assert records.name(7).endswith("00001-of-00004.array_record, record 1")
    a, b = take(config, 2), take(data_config("folder", folder), 2)
    np.testing.assert_array_equal(a[1]["image"], b[1]["image"])

    shard = out / "00002-of-00004.array_record"
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    shard.unlink()
    with pytest.raises(UserError, match="shard"):
        load_source(config)
    pack.main(flags)
    assert "1 shards written" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (folder / "cat" / "99.jpg").write_bytes(encoded(picture(), "JPEG"))
    with pytest.raises(UserError, match="changed since"):
        pack.main(flags)
    with pytest.raises(UserError, match="at least 1"):
        pack.main([*flags, "--shard_size=0"])
    with pytest.raises(UserError, match="holds files but no manifest"):
        pack.main([f"--path={folder}", f"--out={folder}"])


def test_tfds_without_network_or_tensorflow(tmp_path):
    """Catches a source that needs TensorFlow; a dataset prepared here is read as ImageNet would be."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        """Eight pictures."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=[f"kind {i}" for i in range(4)]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(8):
                yield i, {"image": io.BytesIO(encoded(picture(seed=i), "PNG")), "label": i % 4}

    TinyPictures.pkg_dir_path = pathlib.Path(tmp_path)
    builder = TinyPictures(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for name, path in (("tiny_pictures", tmp_path), ("", builder.data_dir)):
        config = data_config("tfds", path, name=name)
        source = load_source(config)
        assert len(source) == 8 and source.num_classes == 4
        assert class_names(source) == {i: f"kind {i}" for i in range(4)}
        half = load_source(config, "train[:50%]")
        assert len(half) == 4 and half.digest() != source.digest()
        found = {source[i][1]: source[i][0] for i in range(4)}
        assert all(data.startswith(b"\x89PNG") for data in found.values())
        batch = take(config, 1)[0]
        assert batch["image"].shape == (8, 16, 16, 3) and sorted(batch["labels"]) == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
        ]
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="TFDS cannot read"):
        load_source(data_config("tfds", tmp_path, name="no_such_dataset"))


def test_sources_that_are_not_there():
    """Catches a traceback for a flag left out."""
    for source in ("folder", "idx", "array_record"):
        with pytest.raises(UserError, match="needs --config.data.path"):
            load_source(data_config(source))
    with pytest.raises(UserError, match="one of digits"):
        load_source(data_config("imagenet"))


def test_tfds_examples_without_a_caption_are_broken(tmp_path):
    """Catches an example without a caption that ends a run, or the packing of a dataset."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyTold(tfds.core.GeneratorBasedBuilder):
        """Six pictures, a third of them without a caption."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                told = [] if i % 3 == 0 else [{"text": f"no. {i}"}, {"text": ""}]
                yield i, {"image": io.BytesIO(encoded(picture(seed=i), "PNG")), "captions": told}

    TinyTold.pkg_dir_path = pathlib.Path(tmp_path)
    TinyTold(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    flags = ["--source=tfds", f"--path={tmp_path}", "--name=tiny_told"]
    pack.main([*flags, f"--out={tmp_path / 'packed'}"])
    for source, path, name in (
        ("tfds", tmp_path, "tiny_told"),
        ("array_record", tmp_path / "packed", ""),
    ):
        config = load_config("t2i_tiny", ["data.crop=center", "batch_size=12"])
        config.data.update(source=source, path=str(path), name=name)
        broken = take(config, 1)[0]["broken"]
        assert len({*broken.tolist()} - {-1}) == 2
        captions = [readable_captions(load_source(config), i) for i in range(6)]
        assert all(found[0].startswith("no. ") for found in captions)
