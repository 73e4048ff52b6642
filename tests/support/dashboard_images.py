"""Drawn images that look like a blood smear, with the exact boxes of what was drawn."""

import io
import random
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 320, 240
# By class: least and greatest radius, fill, rim.
CELLS = {
    0: ((17, 24), (214, 142, 140), (190, 112, 114)),
    1: ((27, 33), (126, 88, 168), (98, 62, 142)),
    2: ((5, 8), (150, 96, 170), (120, 70, 150)),
}
KINDS = [1, 2, 2] + [0] * 14


def draw_cells(seed: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Return a JPEG of 320 x 240 pixels and its boxes: `[{"class", "box": [x1, y1, x2, y2]}]`, in pixels."""
    rng = random.Random(seed)
    image = Image.new("RGB", (WIDTH, HEIGHT), (240, 226, 222))
    draw = ImageDraw.Draw(image)
    placed: list[tuple[float, float, float]] = []
    boxes = []
    for kind in KINDS:
        (least, greatest), fill, rim = CELLS[kind]
        radius = rng.uniform(least, greatest)
        spot = _free_spot(rng, radius, placed)
        if spot is None:
            continue
        x, y = spot
        placed.append((x, y, radius))
        box = [round(x - radius, 1), round(y - radius, 1), round(x + radius, 1), round(y + radius, 1)]
        draw.ellipse(box, fill=fill, outline=rim, width=2)
        if kind == 0:
            draw.ellipse([x - radius / 2.4, y - radius / 2.4, x + radius / 2.4, y + radius / 2.4], fill=(228, 176, 172))
        boxes.append({"class": kind, "box": box})
    file = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.8)).save(file, "JPEG", quality=88)
    return file.getvalue(), boxes


def _free_spot(
    rng: random.Random, radius: float, placed: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    for _ in range(80):
        x, y = rng.uniform(radius + 1, WIDTH - radius - 1), rng.uniform(radius + 1, HEIGHT - radius - 1)
        if all((x - a) ** 2 + (y - b) ** 2 > (0.92 * (radius + r)) ** 2 for a, b, r in placed):
            return x, y
    return None
