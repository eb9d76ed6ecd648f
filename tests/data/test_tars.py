"""Tar shards: their index, ranged reads, buckets; several processes that see data."""

import io
import os
import pathlib
import tarfile
import textwrap

import numpy as np
import pytest
from etils import epath
from PIL import Image

from pixelflow_jax.common import UserError, files
from pixelflow_jax.config import load_config
from pixelflow_jax.data.base import Scan
from pixelflow_jax.data.captions import TarSource
from pixelflow_jax.data.loader import make_examples
from pixelflow_jax.data.sources import FolderSource, load_source
from pixelflow_jax.data.tars import INDEX
from pixelflow_jax.training.start import holds_run

from bucket import Bucket
from conftest import start_hosts


def png(seed: int = 0, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, first: int, count: int = 3, far: int = 0) -> None:
    """`far` bytes stand between each image and its caption."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(first, first + count):
            for name, data in (
                (f"{i}.png", png(i)),
                (f"{i}.bin", bytes(far)),
                (f"{i}.txt", b"no. %d" % i),
            ):
                member = tarfile.TarInfo(("x" * 120 + "/" if i % 2 else "") + name)  # a long name, too
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "0.tar", 0)
    write_shard(tmp_path / "shards" / "1.tar", 3, far=100_000)
    return tmp_path / "shards"


def opened(path, workdir=None):
    """(the source, which shards were read for its index)"""
    read = []
    source = TarSource(str(path), "train", Scan(workdir and epath.Path(workdir), read.append))
    expected = [(png(i), (f"no. {i}",)) for i in range(len(source))]
    assert [source[i] for i in range(len(source))] == expected
    assert [source.captions(i) for i in range(len(source))] == [texts for _, texts in expected]
    return source, len(read)


def test_index_is_kept_and_made_anew(shards, tmp_path):
    """Catches shards that are read at every start, and an index of shards that have changed since."""
    assert opened(shards)[1] == 2 and (shards / INDEX).exists()
    source, read = opened(shards, tmp_path / "run")
    assert read == 0 and not (tmp_path / "run").exists() and len(source) == 6
    os.utime(shards / "1.tar", (1, 1))
    assert opened(shards, tmp_path / "run")[1] == 2 and opened(shards, tmp_path / "run")[1] == 0
    kept = (tmp_path / "run" / INDEX).read_bytes()
    half = kept.index(b"0.tar:0")
    flipped = kept[:half] + bytes([kept[half] ^ 1]) + kept[half + 1 :]
    for damaged in (b"", kept[:-99], flipped, b"x"):
        (tmp_path / "run" / INDEX).write_bytes(damaged)
        assert opened(shards, tmp_path / "run")[1] == 2
    assert holds_run(epath.Path(tmp_path / "run"), load_config("digits")) is False  # no run is there
    (shards / INDEX).unlink()
    write_shard(shards / "2.tar", 6)
    other, read = opened(shards)
    assert read == 3 and len(other) == 9 and other.digest() != source.digest()
    (tmp_path / "file").write_bytes(b"")
    assert opened(shards, tmp_path / "file")[1] == 0  # where nothing can be kept, the other one is read
    (shards / INDEX).unlink()
    assert opened(shards, tmp_path / "file")[1] == 3
    (shards / "3.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"3.tar is not a tar file"):
        opened(shards)


def test_tar_in_a_bucket(shards):
    """Catches shards that are downloaded at every start, or for each example."""
    pytest.importorskip("gcsfs")
    with Bucket() as bucket:
        url = bucket.upload(shards, "data")
        assert opened(url)[1] == 2
        with bucket.count("/o/data") as requests:
            source, read = opened(url)
            assert read == 0
        asked = [path for method, path in requests if "tar?" in path]
        assert len(asked) == (3 + 3) + (2 * 3 + 3)  # image and caption at once if they are near
        with bucket.count("tar") as requests:
            assert source[0][1] == source.captions(0) and source.head(0, 8) == png()[:8]
        assert len(requests) == 3


def test_heads_are_enough_for_sizes(tmp_path, monkeypatch):
    """Catches a scan that reads whole files for their headers; those that say it at the end are read."""
    from pixelflow_jax.data.buckets import HEAD, read_sizes

    (tmp_path / "a").mkdir()
    big = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}
    for suffix, kind in kinds.items():
        options = {"quality": 95} if suffix in ("jpg", "webp") else {}
        Image.fromarray(big).save(tmp_path / "a" / f"0.{suffix}", kind, **options)
        assert (tmp_path / "a" / f"0.{suffix}").stat().st_size > HEAD
    (tmp_path / "a" / "1.png").write_bytes(b"broken")
    config = load_config("digits", ["data.source=folder", f"data.path={tmp_path}"])
    source, whole = load_source(config), []
    read = type(source).__getitem__
    monkeypatch.setattr(
        type(source), "__getitem__", lambda self, i: whole.append(self.name(i)) or read(self, i)
    )
    sizes = {source.name(i)[-5:]: tuple(size) for i, size in enumerate(read_sizes(source).tolist())}
    assert sizes.pop("1.png") == (1, 1) and set(sizes.values()) == {(300, 500)} and len(sizes) == 5
    assert not [name for name in whole if name.endswith(("0.png", "0.jpg", "0.bmp"))]


class Uncaptioned:
    """A source of which every other example has no caption, or a blank one, as datasets of TFDS may."""

    captioned, num_classes = True, 0

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return png(index), ((), ("a two",), (" ",), ("a six",))[index % 4]

    def name(self, index):
        return f"example {index}"


def test_examples_without_a_caption_are_broken():
    """Catches an example without a caption that ends the run (rng.integers(0))."""
    examples = make_examples(
        Uncaptioned(), load_config("t2i_tiny", ["data.crop=center", "data.label_dropout=0.0"])
    )
    found = [examples[position] for position in range(16)]
    assert sorted({int(x["broken"]) for x in found}) == [-1, 0, 2, 4, 6]
    assert all(x["text_mask"].sum() > 1 for x in found)


def test_long_captions_are_said_once(capsys, tmp_path):
    """Catches captions that are cut in training without a word, and a line for each of a million."""
    from pixelflow_jax.data.loader import look_at_captions
    from pixelflow_jax.text.encoder import warn_of_cuts

    config = load_config("t2i_tiny", ["text.max_length=5"])
    look_at_captions(load_source(config), config)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "longer than the limit of 5" in said
        and "of 3,000 are longer too" in said
    )
    look_at_captions(load_source(config), load_config("t2i_tiny"))
    warn_of_cuts([], [], 5)
    assert capsys.readouterr().err == ""
    warn_of_cuts(["a", "b" * 99], [0, 7], 5, "caption")
    assert "caption 'bbb" in capsys.readouterr().err


SEE = """
    import os
    from etils import epath
    from pixelflow_jax.distributed import hosts
    from pixelflow_jax.config import load_config
    from pixelflow_jax.data.base import Scan
    from pixelflow_jax.data.sources import load_source
    from pixelflow_jax.training.start import data_of

    hosts.connect_jax(hosts.gather(60), 60, 60)
    config = load_config("t2i_tiny", ["data.source=webdataset", f"data.path={os.environ['SEE_PATH']}"])
    watched = []
    scan = Scan(epath.Path(os.environ['SEE_WORKDIR']), watched.append)
    source = load_source(config, scan=scan)
    print(len(source), "examples,", len(watched), "shards read")
    print(data_of(source))
"""


@pytest.mark.slow
def test_one_process_reads_and_all_agree(shards, tmp_path):
    """Catches an index that every host makes, and hosts that train on different data without a word."""
    (tmp_path / "see.py").write_text(textwrap.dedent(SEE))
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "0.tar", 0)
    for paths, workdir in (((shards, shards), "run"), ((shards, other), "run2")):
        children = start_hosts(
            2,
            ["see"],
            lambda i, paths=paths, workdir=workdir: {
                "PYTHONPATH": f"{tmp_path}:{pathlib.Path(files.__file__).parents[2]}",
                "SEE_PATH": str(paths[i]),
                "SEE_WORKDIR": str(tmp_path / workdir),
            },
        )
        said = [child.communicate(timeout=300)[0] for child in children]
        if paths[0] == paths[1]:
            assert "6 examples, 2 shards read" in said[0] and "6 examples, 0 shards read" in said[1]
            assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
        else:
            assert all("other data than process 0" in text for text in said), said


def test_folders_in_a_bucket_are_listed_once(tmp_path, caplog):
    """Catches a request for each class, and other classes or another order than on a disk."""
    pytest.importorskip("gcsfs")
    for name in ("b/1.png", "a/x/2.png", "a/0.png", "__MACOSX/0.png", "c/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    here = FolderSource(str(tmp_path), "train")
    with Bucket() as bucket:
        url = bucket.upload(tmp_path, "data")
        with bucket.count("prefix=data/&") as requests:
            there = FolderSource(url, "train")
        assert len([x for x in requests if "delimiter=&" in x[1] or "delimiter" not in x[1]]) <= 1
        assert there.classes == here.classes == ["a", "b", "c"] and there.digest() == here.digest()
        assert [there[i] for i in range(3)] == [here[i] for i in range(3)]
        assert there.head(0, 8) == png()[:8]
    assert f"class folder {url}/c holds no images" in caplog.text
