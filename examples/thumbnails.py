"""Make a thumbnail and a description of each picture: two outputs of each input, and a picture that is damaged.

    python examples/thumbnails.py [DIRECTORY]      without it: in a temporary directory; needs Pillow

    DIRECTORY/pictures/ALBUM/NAME.png  --describe-->  DIRECTORY/thumbs/ALBUM/NAME.webp
                                                      DIRECTORY/meta/ALBUM/NAME.png.json

One picture is cut short. It fails, and costs nothing but itself; once it is repaired, the next run does it alone.
Exits with 1 if a thumbnail is not of its picture's shape and colour, or if one is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageStat

from ringpool import Job

ALBUMS, PICTURES = ("harbour", "hills", "streets"), 12
SIDE_MAX = 96
COLOUR_TOLERANCE = 12  # of 255: WebP is lossy


def describe(src: Path, dst: dict[str, Path], *, side_max: int = SIDE_MAX) -> None:
    """A thumbnail of ``src``, no side of which is longer than ``side_max``, and what the picture is."""
    with Image.open(src) as picture:
        width, height = picture.size
        thumbnail = picture.convert("RGB")
    thumbnail.thumbnail((side_max, side_max))
    thumbnail.save(dst["thumb"])  # as its name ends, so its format is
    dst["meta"].write_text(json.dumps({"width": width, "height": height, "bytes": src.stat().st_size}))


def make_pictures(pictures: Path) -> None:
    """Gradients, each of a size and tint of its own."""
    for i, album in enumerate(ALBUMS):
        (pictures / album).mkdir(parents=True, exist_ok=True)
        for j in range(PICTURES):
            size = (200 + 20 * j, 320 - 15 * j)
            gradient = Image.linear_gradient("L").resize(size)
            flat = Image.new("L", size, 20 * j)
            bands = [gradient, gradient, gradient]
            bands[i] = flat
            Image.merge("RGB", bands).save(pictures / album / f"{j:02}.png")


def wrong_thumbnails(place: Path) -> list[str]:
    """The pictures whose outputs are not as they should be, and why."""
    wrong: list[str] = []
    for path in sorted((place / "pictures").rglob("*.png")):
        relpath = path.relative_to(place / "pictures")
        with Image.open(path) as picture, Image.open(place / "thumbs" / relpath.with_suffix(".webp")) as thumbnail:
            meta = json.loads((place / "meta" / f"{relpath}.json").read_text())
            scale = SIDE_MAX / max(picture.size)
            if any(abs(side - scale * whole) > 1 for side, whole in zip(thumbnail.size, picture.size, strict=True)):
                wrong.append(f"{relpath}: its thumbnail is of another shape")
            means = zip(ImageStat.Stat(thumbnail).mean, ImageStat.Stat(picture).mean, strict=True)
            if any(abs(one - other) > COLOUR_TOLERANCE for one, other in means):
                wrong.append(f"{relpath}: its thumbnail is of another colour")
            if (meta["width"], meta["height"]) != picture.size:
                wrong.append(f"{relpath}: its description is of another picture")
    return wrong


def demonstrate(place: Path) -> int:
    pictures = place / "pictures"
    make_pictures(pictures)
    damaged = pictures / "hills/03.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])

    outputs = {"thumb": f"{place}/thumbs/{{parent}}/{{stem}}.webp", "meta": f"{place}/meta/{{relpath}}.json"}
    job = Job(describe, pictures, outputs)
    first = job.run()
    print(f"{first.progress.done} pictures done, {first.progress.failed} failed:")
    for failure in first.failures:
        print(f"  {Path(failure.path).relative_to(pictures)}: {failure.kind}: {failure.message}")
    damaged.write_bytes(whole)
    second = job.run()
    print(f"repaired: {second.progress.done} more done, {second.progress.skipped} done before")

    wrong = wrong_thumbnails(place)
    print("\n".join(wrong) or f"{len(ALBUMS) * PICTURES} thumbnails are of their pictures' shape and colour")
    return 0 if first.progress.failed == second.progress.done == 1 and second.ok and not wrong else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place.absolute())
    with tempfile.TemporaryDirectory(prefix="thumbnails-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":  # worker processes import this module, too
    sys.exit(main())
