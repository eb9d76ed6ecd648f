"""Render the Noto emoji with their names, as a caption_folder for configs/emoji.py.

    apt-get install fonts-noto-color-emoji unicode-data
    python docs/emoji.py --out=emoji

One's own pictures take the same form: image files, and a metadata.jsonl that gives each one's caption
(docs/text.md). Emoji that differ in skin tone only are left out, and those that the font lacks.
"""

import argparse
import json
import pathlib
import re

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "/usr/share/unicode/emoji/emoji-test.txt"
LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified *# \S+ E[0-9.]+ (.+)")
FONT_SIZE = 109  # the only one of this font's bitmaps
WIDEST = 150  # pixels; a sequence that the font lacks is drawn as several pictures side by side


def render(text: str, font: ImageFont.FreeTypeFont, side: int) -> Image.Image | None:
    """Return an emoji in the middle of a white square; None if the font has no picture of it."""
    left, top, right, bottom = font.getbbox(text)
    if right - left > WIDEST or right <= left:
        return None
    size = max(right - left, bottom - top)
    image = Image.new("RGB", (size, size), "white")
    place = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(image).text(place, text, font=font, embedded_color=True)
    if image.getextrema() == ((255, 255),) * 3:
        return None
    return image.resize((side, side), Image.Resampling.LANCZOS)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--side", type=int, default=64, help="pixels per side (default: %(default)s)")
    parser.add_argument("--font", default=FONT)
    parser.add_argument("--names", default=NAMES)
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    for path in filter(lambda path: not pathlib.Path(path).is_file(), (args.font, args.names)):
        parser.error(f"{path} is not there: apt-get install fonts-noto-color-emoji unicode-data")
    if out.exists():
        parser.error(f"--out={out} exists: name a new folder")
    out.mkdir(parents=True)
    font, rows, seen = ImageFont.truetype(args.font, FONT_SIZE), [], set()
    for codes, name in LINE.findall(pathlib.Path(args.names).read_text()):
        name = re.sub("[^a-z0-9]+", " ", name.lower()).strip()
        image = render("".join(chr(int(code, 16)) for code in codes.split()), font, args.side)
        if "skin tone" in name or image is None or name in seen:
            continue
        seen.add(name)
        rows.append({"file_name": f"{name.replace(' ', '_')}.png", "text": name})
        image.save(out / rows[-1]["file_name"])
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} pictures with captions in {out}")


if __name__ == "__main__":
    main()
