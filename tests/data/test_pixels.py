"""The one way in for pixels: modes, formats, orientations, kinds of transparency, and file names."""

import io
import logging
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pixelflow_jax.config import default_config
from pixelflow_jax.data import pixels, records
from pixelflow_jax.data.buckets import read_sizes
from pixelflow_jax.data.pixels import BrokenImage, decode, is_image, is_left_behind, read_size
from pixelflow_jax.data.sources import open_source
from pixelflow_jax.data.transforms import transform
from pixelflow_jax.evaluation.sets import open_images
from pixelflow_jax.sampling.starts import read_pictures

RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1), int)).astype(np.uint8)  # 32x48
GREY = RGB[..., 0]
# By EXIF's definition: where the first row and the first column of the stored picture belong
TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def encoded(image, kind, **options):
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data):
    """What `decode` gives, whose size must be that of the header."""
    found = np.asarray(decode(data))
    np.testing.assert_array_equal(found, np.asarray(decode(decode(data))))
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    assert read_size(data) == found.shape[:2]
    return found.astype(int)


def over_white(colours, alpha):
    """Colours [.., 3] with alpha [..] of 0..255, as seen on white."""
    share = np.asarray(alpha)[..., None] / 255
    return share * colours + (1 - share) * 255


def chunk(kind, body):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth, colour, rows, transparent=None, late_exif=None):
    """A PNG file made by hand, for what Pillow does not write; `rows` are packed bytes [h, n]."""
    height = len(rows)
    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour])
    out = b"\x89PNG\r\n\x1a\n"
    out += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    if transparent is not None:
        out += chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes())
    packed = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    out += chunk(b"IDAT", zlib.compress(packed.tobytes()))
    if late_exif is not None:
        out += chunk(b"eXIf", late_exif)
    return out + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_pictures_are_turned_as_exif_says(kind, orientation):
    """Catches photos that come in sideways or turned twice, a bucket for the unturned size, and trouble
    with an orientation that EXIF does not know (0 and 9)."""
    if kind == "AVIF" and kind not in pixels.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(JPEG=dict(quality=95, subsampling=0), WEBP=dict(lossless=True), AVIF=dict(quality=95))
    data = encoded(Image.fromarray(RGB), kind, exif=exif, **options.get(kind, {}))
    expected = TURNED.get(orientation, TURNED[1])(RGB)
    found = shown(data)
    assert found.shape == expected.shape
    assert np.abs(found - expected)[4:-4].mean() < 6, "not this way up"


def test_exif_in_odd_places():
    """Catches an eXIf chunk behind the pixels, an orientation in XMP, and a damaged block that makes a
    good picture unreadable."""
    exif = Image.Exif()
    exif[0x0112] = 6
    late = png(8, 2, RGB.reshape(32, -1), late_exif=exif.tobytes()[6:])
    np.testing.assert_array_equal(shown(late), TURNED[6](RGB))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    assert shown(encoded(Image.fromarray(RGB), "JPEG", xmp=xmp)).shape == (48, 32, 3)
    for damaged in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\5junk"):
        data = encoded(Image.fromarray(RGB), "PNG", exif=damaged)
        np.testing.assert_array_equal(shown(data), RGB)


ALPHA = np.repeat(np.array([0, 1, 100, 254, 255, 128] * 8)[None], 32, 0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TGA", "ICO", "DDS", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(kind, mode):
    """Catches hidden colours that show, and pictures that turn black."""
    if kind not in pixels.FORMATS or (mode == "LA" and kind in ("ICO", "DDS", "WEBP")):
        pytest.skip("no such files")
    parts = RGB if mode == "RGBA" else GREY[..., None]
    image = Image.fromarray(np.concatenate([parts, ALPHA[..., None]], axis=-1))
    options = dict(WEBP=dict(lossless=True, exact=True), ICO=dict(sizes=[image.size]))
    found = shown(encoded(image, kind, **options.get(kind, {})))
    assert np.abs(found - over_white(parts, ALPHA)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX"])
def test_rare_modes_of_pillow(mode):
    """Catches colours multiplied by alpha taken as they are, and a filler taken for alpha."""
    source = Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], axis=-1))
    if mode == "PA":
        image = Image.fromarray(GREY).convert("P").convert("PA")
        image.putalpha(Image.fromarray(ALPHA))
        expected = over_white(np.asarray(image.convert("RGBA"))[..., :3], ALPHA)
    elif mode == "La":
        image = Image.fromarray(np.stack([GREY, ALPHA], axis=-1)).convert("La")
        expected = over_white(GREY[..., None], ALPHA)
    elif mode == "RGBX":
        image, expected = Image.fromarray(RGB).convert("RGBX"), RGB
    else:
        image, expected = source.convert(mode), over_white(RGB, ALPHA)
    assert np.abs(np.asarray(decode(image)).astype(int) - expected).max() <= 2


def test_transparent_colours():
    """Catches "transparency" without an alpha channel: of palettes (one entry, or an alpha each), of a
    grey of every depth, and of a colour of 8 or 16 bits."""
    levels = np.arange(48 * 32).reshape(32, 48) % 4
    palette = Image.fromarray(levels.astype(np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]])[levels]
    for kind in ("PNG", "GIF"):
        found = shown(encoded(palette, kind, transparency=2))
        np.testing.assert_array_equal(found, np.where(levels[..., None] == 2, 255, colours))
    alphas = np.array([255, 0, 128, 40])
    found = shown(encoded(palette, "PNG", transparency=bytes(alphas.tolist())))
    assert np.abs(found - over_white(colours, alphas[levels])).max() <= 1

    for depth in (1, 2, 4, 8, 16):
        values = (np.arange(32 * 48) % min(2**depth, 300)).reshape(32, 48)
        if depth == 16:
            packed, key = (values + 700).astype(">u2").view(np.uint8), 705
            grey, hidden = (values + 700) / 257, values == 5
        else:
            bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
            packed, key = np.packbits(bits.reshape(32, -1), axis=1), 1
            grey, hidden = values * 255 / (2**depth - 1), values == 1
        found = shown(png(depth, 0, packed.reshape(32, -1), transparent=[key]))
        assert np.abs(found - np.where(hidden, 255, grey)[..., None]).max() <= 0.51, depth

    key = RGB[0, 0].astype(int)
    hidden = (RGB == key).all(axis=-1, keepdims=True)
    found = shown(png(8, 2, RGB.reshape(32, -1), transparent=key))
    np.testing.assert_array_equal(found, np.where(hidden, 255, RGB))
    wide = (RGB.astype(int) * 257).astype(">u2")
    found = shown(png(16, 2, wide.view(np.uint8).reshape(32, -1), transparent=key * 257))
    np.testing.assert_array_equal(found, np.where(hidden, 255, RGB))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big", "PPM", "JPEG2000", "TIFF F", "PFM"])
def test_wide_numbers_are_scaled(kind):
    """Catches 16 bits that are cut off at 255, a shift that is not a division, and floats that become
    black."""
    wide = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    if kind in ("TIFF F", "PFM"):
        image = Image.fromarray((wide / 65535).astype(np.float32))
        data = encoded(image, "TIFF" if kind == "TIFF F" else "PPM")
    elif kind == "TIFF big":
        data = encoded(Image.frombytes("I;16B", (48, 32), wide.astype(">u2").tobytes()), "TIFF")
    elif kind == "PPM":
        data = b"P5 48 32 65535\n" + wide.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(wide), kind)
    found = shown(data)
    assert np.abs(found - (wide / 257)[..., None]).max() <= 0.51


@pytest.mark.parametrize("bad", ["-0.01", "1.01", "255", "nan", "inf", "int32", "int16"])
def test_numbers_of_unknown_range_are_refused(bad):
    """Catches a guess: floats outside [0, 1] and whole numbers of 32 bits or with a sign."""
    if bad.startswith("int"):
        image = Image.fromarray(np.full((8, 8), 1000, np.int32))
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        data = encoded(image, "TIFF", tiffinfo=tags)
        if bad == "int16":
            info = {339: 2}
            data = encoded(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "TIFF", tiffinfo=info)
    else:
        values = np.full((8, 8), 0.5, np.float32)
        values[3, 4] = float(bad)
        data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(BrokenImage, match="its pixels are (floats from|32-bit)"):
        decode(data)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("1", "TIFF"), ("L", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("P", "BMP"),
     ("RGB", "BMP"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", ""), ("HSV", ""), ("LAB", "TIFF"),
     ("RGB", "QOI")],
)  # fmt: skip
def test_modes_without_alpha(mode, kind):
    """Catches a mode that comes in as other colours than those that were stored."""
    if mode == "LAB":
        grey = np.stack([GREY, np.full_like(GREY, 0), np.full_like(GREY, 0)], axis=-1)
        image, expected = Image.frombytes("LAB", (48, 32), grey.tobytes()), None
    else:
        image = Image.fromarray(RGB).convert(mode)
        expected = np.asarray(image.convert("RGB")).astype(int)
    found = shown(encoded(image, kind)) if kind else np.asarray(decode(image)).astype(int)
    if expected is None:  # a neutral axis stays neutral, and in order
        assert np.ptp(found, axis=2).max() <= 2
        assert (np.diff(found[..., 0].ravel()[np.argsort(GREY.ravel(), kind="stable")]) >= 0).all()
    else:
        assert np.abs(found - expected).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    """Catches another frame, or a size of all frames."""
    frames = [Image.fromarray(np.full((32, 48, 3), level, np.uint8)) for level in (10, 200)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(shown(data) - 10).max() <= 2


@pytest.mark.parametrize("kind", [name for name in pixels.FORMATS if name in Image.SAVE])
def test_every_format_that_is_taken_can_be_read(kind):
    """Catches a suffix that is listed and a decoder that is not, and headers of another size."""
    image = Image.fromarray(RGB)
    try:
        data = encoded(image, kind, **(dict(sizes=[image.size]) if kind == "ICO" else {}))
    except (OSError, ValueError):  # takes one mode alone
        data = encoded(image.convert("1" if kind in ("XBM", "MSP") else "P"), kind)
    found = shown(data).shape
    assert found == RGB.shape or (kind == "ICNS" and found[0] == found[1])  # whose sizes are its own


@pytest.mark.parametrize("values", [RGB, GREY, GREY[..., None], (RGB / 255).astype(np.float64),
                                    RGB.astype(np.uint16) * 257])  # fmt: skip
def test_arrays_come_in_by_the_same_door(values):
    """Catches an array of another kind that is taken for bytes, or refused."""
    expected = RGB if values.shape[2:] == (3,) else np.repeat(GREY[..., None], 3, -1)
    np.testing.assert_array_equal(np.asarray(decode(values)), expected)
    for bad in (np.zeros((2, 2, 2, 3), np.uint8), np.zeros((0, 4, 3), np.uint8), RGB.astype(np.int64)):
        with pytest.raises(BrokenImage):
            decode(bad)


def test_names():
    """Catches suffixes of formats that can be read, in any case, that are left out; and what systems
    leave behind taken for images or classes."""
    for (
        name
    ) in "a.jpg b.JPE c.jfif d.Tif e.webp f.gif g.BMP h.apng i.jp2 k.tga l.qoi x/y/m.j2k n.mpo".split():
        assert is_image(name), name
    assert is_image("a.avif") == ("AVIF" in pixels.FORMATS)
    for name in ("._a.jpg", "__MACOSX/a.jpg", "x/.ipynb_checkpoints/a.png", "@eaDir/a.jpg",
                 "lost+found/a.png", "$RECYCLE.BIN/a.png", ".hid/x/a.png", "x/desktop.ini"):  # fmt: skip
        assert is_left_behind(name) and not is_image(name), name
    for name in ("a.txt", "a.pdf", "a.eps", "a.mp4", "jpg", "a.jpg/b", "a.heic"):
        assert not is_image(name) and not is_left_behind(name), name


def test_what_is_not_taken_is_said(tmp_path, caplog):
    """Catches files that are left out in silence, and a word about what systems leave behind."""
    for name in (
        "cat/a.png",
        "cat/b.HEIC",
        "cat/c.heic",
        "cat/notes",
        "cat/.DS_Store",
        "__MACOSX/a.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert pixels.image_files(str(tmp_path)) == ["cat/a.png"]
    assert "3 files are not taken as images: 2 of .heic, 1 of no suffix" in caplog.text


def test_every_way_in_is_the_same(tmp_path, caplog):
    """Catches a source, a packing, an evaluation, a start or a table of sizes that sees other pixels or
    other files than the rest, or leaves files out in silence."""
    exif = Image.Exif()
    exif[0x0112] = 6
    hidden = np.concatenate([RGB, np.where(RGB[..., :1] > 99, 255, 0).astype(np.uint8)], axis=-1)
    wide = Image.fromarray((GREY / 255).astype(np.float32))
    pictures = {
        "a.JPG": encoded(Image.fromarray(RGB), "JPEG", quality=95, exif=exif),
        "b.png": encoded(Image.fromarray(hidden.swapaxes(0, 1).copy()), "PNG"),
        "c.tif": encoded(wide.transpose(Image.Transpose.TRANSPOSE), "TIFF"),
        "d.jfif": encoded(Image.fromarray(RGB), "JPEG", quality=95, exif=exif),
    }
    strange = {"e.heic": b"x", "._a.jpg": b"x", "Thumbs.db": b"x", ".ipynb_checkpoints/f.png": b"x"}
    truth = np.stack([np.asarray(decode(data)) for data in pictures.values()])
    assert truth.shape == (4, 48, 32, 3)
    captions = {f"{name.partition('.')[0]}.txt": b"red" for name in pictures}
    for folder, files in (("classes/cat", {}), ("captions", captions)):
        for name, data in (pictures | strange | files).items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (tmp_path / "classes" / "__MACOSX").mkdir()
    (tmp_path / "classes" / "__MACOSX" / "._a.jpg").write_bytes(b"x")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for name, data in (pictures | strange | captions).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    data = default_config().data
    data.resolution, data.crop = 32, "none"
    ways = {"folder": "classes", "caption_folder": "captions", "webdataset": "shards"}
    for source, folder in ways.items():
        data.source, data.path = source, str(tmp_path / folder)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = open_source(data)
        assert "1 files are not taken as images: 1 of .heic" in caplog.text, source
        pytest.importorskip("array_record")
        records.pack(found, str(tmp_path / f"packed_{source}"), 10, {})
        packed = records.RecordSource(str(tmp_path / f"packed_{source}"), "train")
        for way in (found, packed):
            rng = np.random.default_rng(0)
            seen = [transform(way[i][0], [(48, 32)], "none", False, rng) for i in range(len(way))]
            np.testing.assert_array_equal(seen, truth)
            np.testing.assert_array_equal(read_sizes(way), [(48, 32)] * 4)
    judged = open_images(str(tmp_path / "classes" / "cat"), "samples")
    np.testing.assert_array_equal(judged.read(0, judged.count), truth)
    np.testing.assert_array_equal(read_pictures(str(tmp_path / "captions"), "invert")[0], truth)
