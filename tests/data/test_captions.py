"""Captioned data: folders, tar shards, packed records; captions that are missing or damaged."""

import argparse
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pixelflow_jax import encode, pack
from pixelflow_jax.common import UserError
from pixelflow_jax.config import load_config
from pixelflow_jax.data.captions import CaptionFolder, TarSource
from pixelflow_jax.data.loader import make_batches
from pixelflow_jax.data.sources import load_source, readable_captions
from pixelflow_jax.training.loop import grid_conditions


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


EXPECTED = {"a": ("a red six",), "b": ("a blue two", "größe"), "deep/c": ("a small four",)}


@pytest.fixture
def text_folder(tmp_path):
    """Images with NAME.txt."""
    root = tmp_path / "texts"
    for seed, (name, captions) in enumerate(EXPECTED.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(png(seed))
        (root / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return root


def contents(source):
    return {source.name(i).rsplit("/", 1)[1]: source[i] for i in range(len(source))}


def test_folder_with_texts(text_folder):
    """Catches captions that belong to another image, and a second caption that is lost."""
    found = contents(CaptionFolder(str(text_folder), "train"))
    assert found["a.png"] == (png(0), EXPECTED["a"])
    assert found["b.png"] == (png(1), EXPECTED["b"])
    assert found["c.png"] == (png(2), EXPECTED["deep/c"])


def test_a_missing_split_is_not_the_whole(text_folder):
    """Catches training on the validation images, where there is no folder for training."""
    (text_folder / "val").mkdir()
    with pytest.raises(UserError, match="there is no .*/train; splits there: val"):
        CaptionFolder(str(text_folder), "train")


def test_folder_with_metadata(text_folder):
    """Catches metadata.jsonl that is not read, or read for another folder."""
    (text_folder / "deep" / "c.txt").unlink()
    line = {"file_name": "c.png", "text": ["one", "two"]}
    (text_folder / "deep" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert contents(CaptionFolder(str(text_folder), "train"))["c.png"][1] == ("one", "two")
    for text, match in (
        ('{"file_name": "d.png", "text": "x"}', "names deep/d.png, which is not there"),
        ('{"text": "x"}', "line 1 is not a JSON object with a file_name"),
        ('{"file_name": "c.png", "words": "x"}', "line 1 has no caption"),
        ('{"file_name": "c.png", "text": 5}', "must be a text"),
    ):
        (text_folder / "deep" / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match=match):
            CaptionFolder(str(text_folder), "train")
    (text_folder / "deep" / "metadata.jsonl").write_bytes(b'{"file_name": "c.png", "text": "\xff"}')
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        CaptionFolder(str(text_folder), "train")


def test_captions_that_are_missing_or_damaged(text_folder):
    """Catches an image that is trained on without its caption."""
    (text_folder / "a.txt").write_bytes(b"gr\xf6\xdfe")
    with pytest.raises(OSError, match=r"a.txt is not UTF-8"):
        CaptionFolder(str(text_folder), "train")[0]
    (text_folder / "a.txt").write_text(" \n")
    with pytest.raises(OSError, match=r"a.txt is empty"):
        CaptionFolder(str(text_folder), "train")[0]
    source = CaptionFolder(str(text_folder), "train")
    assert readable_captions(source, 0) == readable_captions(source, 4) == EXPECTED["b"]
    flags = ["source=caption_folder", f"path={text_folder}", "split=train"]
    flags = [f"--config.data.{flag}" for flag in flags]
    args = argparse.Namespace(captions=None)
    config = load_config("t2i_256", [flag.removeprefix("--config.") for flag in flags])
    assert list(encode.all_captions(args, config)) == [*EXPECTED["b"], *EXPECTED["deep/c"]]
    index = np.arange(4)
    tiny = load_config("t2i_tiny", ["text.max_length=4"])
    drawn = grid_conditions(tiny, source, index)[0]["text_ids"]
    assert (drawn[0] == drawn[1]).all() and (drawn[3] == drawn[0]).all()
    for name in ("b.txt", "deep/c.txt"):
        (text_folder / name).write_text("")
    with pytest.raises(UserError, match="no caption of the data can be read"):
        readable_captions(source, 0)
    (text_folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images have no caption .*: a.png"):
        CaptionFolder(str(text_folder), "train")


def add(tar, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_tar_shards(tmp_path):
    """Catches a caption from another member, a JSON one that is not read, a shard that is skipped."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            add(tar, f"x/{shard}0.png", png(shard))
            add(tar, f"x/{shard}0.txt", b"a six")
            add(tar, f"x/{shard}1.json", json.dumps({"caption": "a two"}).encode())
            add(tar, f"x/{shard}1.jpg", png(shard + 5))
    source = TarSource(str(tmp_path), "train")
    assert [source[i] for i in range(4)] == [
        (png(0), ("a six",)),
        (png(5), ("a two",)),
        (png(1), ("a six",)),
        (png(6), ("a two",)),
    ]
    with tarfile.open(tmp_path / "2.tar", "w") as tar:
        add(tar, "bare.png", png(0))
    with pytest.raises(UserError, match=r"2.tar: 1 of 1 images have no caption .*: bare"):
        TarSource(str(tmp_path), "train")
    (tmp_path / "2.tar").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"2.tar is not a tar file"):
        TarSource(str(tmp_path), "train")


def test_packed_captions_feed_the_loader(text_folder, tmp_path):
    """Catches captions lost on the way into records or out, and texts that are never dropped."""
    out = tmp_path / "packed"
    pack.main(["--source=caption_folder", f"--path={text_folder}", f"--out={out}"])
    overrides = [
        "data.source=array_record",
        f"data.path={out}",
        "batch_size=6",
        "data.label_dropout=0.5",
        "data.resolution=24",
    ]
    config = load_config("t2i_tiny", overrides)
    source, plain = load_source(config), CaptionFolder(str(text_folder), "train")
    assert [source[i] for i in range(3)] == [plain[i] for i in range(3)]
    batches = list(itertools.islice(make_batches(source, config), 8))
    lengths = np.concatenate([batch["text_mask"].sum(axis=1) for batch in batches])
    assert 0.25 < (lengths == 1).mean() < 0.75  # the end mark alone
    assert set(lengths) == {1, 2, 4}
