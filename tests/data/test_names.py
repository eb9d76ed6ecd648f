"""Texts and names as people have them: encodings, line ends, names written another way."""

import io
import json
import logging
import tarfile
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelflow_jax import encode
from pixelflow_jax.common import UserError, files
from pixelflow_jax.data.captions import CaptionFolder, TarSource
from pixelflow_jax.data.names import Finder, Strings, pair, plain
from pixelflow_jax.data.texts import decode_captions
from pixelflow_jax.requests.layouts import read_prompts_file

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32-le": b"\xff\xfe\0\0",
    "utf-32-be": b"\0\0\xfe\xff",
}
LINE_ENDS = ("\n", "\r\n", "\r")
# What a person may write on a line: all but line ends, controls, marks of byte order and half characters
LETTERS = st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\ufeff")
LINES = st.lists(st.text(LETTERS, min_size=1).filter(lambda x: x.strip()), min_size=1, max_size=5)


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_file(lines, encoding: str, end: str, last: str) -> bytes:
    return ENCODINGS[encoding] + (end.join(lines) + last).encode(encoding)


@settings(deadline=None, max_examples=60)
@given(LINES, st.sampled_from(list(ENCODINGS)), st.sampled_from(LINE_ENDS), st.integers(0, 3))
def test_one_reader_of_text(tmp_path_factory, lines, encoding, end, blank):
    """Catches a mark of byte order, a line end or an encoding that only one reader knows."""
    folder = tmp_path_factory.mktemp("texts")
    data = as_file(lines, encoding, end, end * blank)
    for name in ("p.txt", "0.txt"):
        (folder / name).write_bytes(data)
    expected = [line.strip() for line in lines]
    assert list(decode_captions(data, "x")) == expected
    assert [entry["prompt"] for entry in read_prompts_file(str(folder / "p.txt"))] == expected
    args = type("Args", (), {"captions": str(folder / "p.txt")})
    assert list(encode.all_captions(args, None)) == expected
    objects = [json.dumps({"prompt": line, "text": line, "file_name": "0.png"}) for line in lines]
    (folder / "p.jsonl").write_bytes(as_file(objects, encoding, end, end * blank))
    assert [entry["prompt"] for entry in read_prompts_file(str(folder / "p.jsonl"))] == expected
    (folder / "0.png").write_bytes(b"")
    (folder / "p.jsonl").rename(folder / "metadata.jsonl")
    assert CaptionFolder(str(folder), "train").captions(0) == tuple(lines)


@pytest.mark.parametrize(
    "data", ["größe".encode("latin-1"), "größe\n".encode("utf-16-le"), b"a\0b", b"\xff\xfea"]
)
def test_what_is_no_text_is_said_to_be_none(tmp_path, data):
    """Catches zero bytes and letters of another encoding that stay in a caption without a word."""
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UserError, match="p.txt is not UTF-8"):
        read_prompts_file(str(tmp_path / "p.txt"))
    with pytest.raises(OSError, match="x is not UTF-8"):
        decode_captions(data, "x")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "a"}\n' + data)
    (tmp_path / "0.png").write_bytes(b"")
    if data[0] != 0xFF:
        with pytest.raises(UserError, match="line 2 is not UTF-8"):
            CaptionFolder(str(tmp_path), "train")


def test_files_that_were_put_together_keep_no_marks():
    """Catches the second file's mark in the middle of `cat a.jsonl b.jsonl`."""
    text = files.decode_text("a\n".encode("utf-8-sig") * 2)
    assert files.split_lines(text) == ["a", "a"]


# A picture, and ways in which metadata name it
SAME = (
    ("0.png", ["0.png", "./0.png", ".//0.png", "x/../0.png", "0.PNG", "0%2Epng", ".\\0.png"]),
    ("a b/c d.png", ["a b/c d.png", "a%20b/c%20d.png", "a b\\c d.png", "./a b//c d.png", "A b/C D.png"]),
    ("gr\u00f6\u00dfe.png", ["gro\u0308\u00dfe.png", "gr%C3%B6%C3%9Fe.png", "./gr\u00f6\u00dfe.png"]),
    ("e\u0301.png", ["\u00e9.png", "%C3%A9.png"]),
    ("100%25.png", ["100%25.png", "100%.png"]),
)


@pytest.mark.parametrize(("there", "asked"), [(there, x) for there, ways in SAME for x in ways])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_name_files_in_other_ways(tmp_path, there, asked, kind):
    """Catches metadata whose pictures "are not there", though a person sees that they are."""
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(png())
    if kind == "jsonl":
        text = json.dumps({"file_name": asked, "text": "one"}) + "\n"
    else:
        text = f'file_name,text\n"{asked}","one"\n'
    (tmp_path / f"metadata.{kind}").write_text(text)
    source = CaptionFolder(str(tmp_path), "train")
    assert source[0] == (png(), ("one",)) and source.name(0) == f"{tmp_path}/{there}"


def test_names_that_are_both_there_are_told_apart(tmp_path):
    """Catches a caption that goes to a picture of nearly the same name."""
    names = ["a.png", "A.png", "a%41.png", "aA.png", unicodedata.normalize("NFD", "é.png"), "é.png"]
    find = Finder(names)
    assert [find(name) for name in names] == names
    assert find("AA.png") is None  # two could be meant
    assert find("./A.png") == "A.png" and plain("a\\b//./c") == "a/b/c"


def test_several_lines_for_one_picture(tmp_path):
    """Catches captions of which the last alone is kept, and pictures named in two ways."""
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png())
    rows = [("0.png", "a"), ("1.png", ["x", "y"]), ("./0.png", "b"), ("0.png", "c"), ("1.png", "z")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = CaptionFolder(str(tmp_path), "train")
    assert [source.captions(i) for i in range(2)] == [("a", "b", "c"), ("x", "y", "z")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_metadata_csv(tmp_path, separator):
    """Catches a table as a spreadsheet saves it: separators, quotes, line breaks, a mark."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [
        ["other", " file_name", "text "],
        ["5", "1.png", f'"a{separator} ""b""\nc"'],
        [],
        ["", "0.png", "d"],
    ]
    rows += [["", "2.png", "e", "too much"], ["", "1.png", "f"]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    source = CaptionFolder(str(tmp_path), "train")
    assert [source.captions(i) for i in range(3)] == [("d",), (f'a{separator} "b"\nc', "f"), ("e",)]
    for text, match in (
        ("name,text\n0.png,a\n", "no column file_name"),
        ("file_name,text\n,a\n", "line 2 has no file_name"),
        ("file_name,text\n0.png\n", "line 2 has no caption"),
        ("", "no column file_name"),
        ("file_name,text\n9.png,a\n", "names 9.png, which is not there"),
        ('file_name,text\n0.png,"' + 200_000 * "a", "cannot be read"),
    ):
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(UserError, match=match):
            CaptionFolder(str(tmp_path), "train")
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="keep one"):
        CaptionFolder(str(tmp_path), "train")


def test_blank_captions_count_as_broken(tmp_path):
    """Catches an image that is trained on without its caption, and half a character that ends a run."""
    (tmp_path / "0.png").write_bytes(png())
    for text in ("", " ", ["", "\n"]):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": text}))
        with pytest.raises(OSError, match="empty"):
            CaptionFolder(str(tmp_path), "train")[0]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "\\ud800"}')
    with pytest.raises(UserError, match="not UTF-8 text"):
        CaptionFolder(str(tmp_path), "train")


PAIRS = (
    # images, texts, {image: text}, without, beside another
    (["4.4.jpg", "4.5.jpg"], ["4.5.txt", "4.4.txt"], {f"4.{i}.jpg": f"4.{i}.txt" for i in "45"}, [], []),
    (["a/b.c/1.jpg"], ["a/b.d/1.txt", "a/b.c/1.txt"], {"a/b.c/1.jpg": "a/b.c/1.txt"}, [], []),
    (["1.jpg", "1.seg.png"], ["1.txt"], {"1.jpg": "1.txt"}, [], ["1.seg.png"]),
    (["1.input.jpg"], ["1.txt"], {"1.input.jpg": "1.txt"}, [], []),
    (["1.jpg"], ["1.caption.txt"], {"1.jpg": "1.caption.txt"}, [], []),
    (["1.left.jpg", "1.right.jpg"], ["1.txt"], {}, ["1.left.jpg", "1.right.jpg"], []),
    (["1.jpg"], ["1.a.txt", "1.b.txt"], {}, ["1.jpg"], []),
    (["img.jpg", "img.4.jpg"], ["img.txt"], {"img.jpg": "img.txt"}, ["img.4.jpg"], []),
    (["img.jpg", "img.a.jpg"], ["img.a.txt"], {"img.a.jpg": "img.a.txt"}, ["img.jpg"], []),
    (["e\u0301.jpg"], ["\u00e9.txt"], {"e\u0301.jpg": "\u00e9.txt"}, [], []),
    (["B.JPG"], ["b.txt"], {"B.JPG": "b.txt"}, [], []),
    (["v1.2.final.jpg"], ["v1.2.final.txt"], {"v1.2.final.jpg": "v1.2.final.txt"}, [], []),
    (["x/1.jpg"], ["y/1.txt"], {}, ["x/1.jpg"], []),
)  # fmt: skip


@pytest.mark.parametrize(("images", "texts", "found", "bare", "beside"), PAIRS)
def test_pairs(images, texts, found, bare, beside):
    """Catches an image that gets the caption of another, or is left out in silence."""
    assert pair(images, texts) == (found, bare, beside)


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@settings(deadline=None, max_examples=25)
@given(
    st.sets(
        st.from_regex(r"([a-z.]{0,4}/)?[a-zé0-9]([a-z0-9. _-]{0,8}[a-z0-9])?", fullmatch=True),
        min_size=1,
    )
)
def test_every_key_has_its_own_caption(tmp_path_factory, keys):
    """Catches keys (with dots, blanks, folders) that are skipped, merged, or get another's caption."""
    keys = {
        key for key in keys if not any(part.startswith(".") for part in key.split("/")) and key[0] != "/"
    }
    folder = tmp_path_factory.mktemp("keys")
    members = {}
    for number, key in enumerate(sorted(keys)):
        members |= {
            f"{key}.png": png(number % 7) + bytes([number]),
            f"{key}.txt": f"no. {number}".encode(),
        }
    members = members or {"0.png": png(), "0.txt": b"no. 0"}
    write_tar(folder / "a.tar", members)
    source = TarSource(str(folder), "train")
    assert len(source) == len(members) // 2
    for i in range(len(source)):
        key = source.name(i).partition("a.tar:")[2]
        assert source[i] == (members[f"{key}.png"], (members[f"{key}.txt"].decode(),))
        assert source.captions(i) == source[i][1] and members[f"{key}.png"].startswith(source.head(i, 9))


def test_what_a_tar_leaves_out_is_said(tmp_path, caplog):
    """Catches members that are skipped in silence."""
    members = {
        "0.jpg": png(),
        "0.png": png(1),
        "0.json": b'{"caption": "a"}',
        "1.heic2": b"",
        "1.txt": b"b",
    }
    write_tar(tmp_path / "a.tar", members)
    with caplog.at_level(logging.WARNING):
        source = TarSource(str(tmp_path), "train")
    assert [source[i] for i in range(len(source))] == [(png(1), ("a",))]
    assert "1 images are left out" in caplog.text and "0.jpg" in caplog.text
    assert "1 captions have no image that is read: 1.txt" in caplog.text


def test_captions_in_a_tar_that_cannot_be_read_are_broken(tmp_path):
    """Catches a caption of one example that ends the run."""
    bad = [
        b"{",
        b'{"words": "x"}',
        b'{"text": 5}',
        b'{"text": ""}',
        b"[]",
        b'{"text": "\\ud800"}',
        b"\xff",
    ]
    members = {
        f"{i}.{kind}": data for i, x in enumerate(bad) for kind, data in (("png", png()), ("json", x))
    }
    write_tar(
        tmp_path / "a.tar", members | {"x.png": png(), "x.txt": b"\xff", "y.png": png(), "y.txt": b""}
    )
    source = TarSource(str(tmp_path), "train")
    for i in range(len(source)):
        with pytest.raises(OSError, match="a.tar:"):
            source[i]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=20))
def test_strings(texts):
    """Catches a text cut at the wrong place, and a digest that does not see where texts end."""
    kept = Strings(texts)
    assert [kept[i] for i in range(len(kept))] == texts and (not texts or kept[-1] == texts[-1])
    other = Strings(["".join(texts), *[""] * (len(texts) - 1)] if texts else ["x"])
    assert (other.digest() == kept.digest()) == ([other[i] for i in range(len(other))] == texts)
