"""The share of padding in batches, with and without grouping images of similar shapes.

    python -m benchmarks.padding [--quick]

Image sizes are like COCO's, resized to 800x1333. A batch has the height of its highest and the width of its widest
image, each rounded up to a multiple of 32. For each batch size it prints the area of all batches of one epoch over the
area of their images. The last line is one JSON object; the exit code is 1 if a goal is missed.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from defeat.engine.data.loading.order import BatchOrder
from defeat.engine.data.loading.resize import InputSize

GOAL = 1.10
BATCH_SIZES = (2, 4, 8, 16)
SIZE = InputSize(min_size=800, max_size=1333)

Size = tuple[int, int]


def coco_like(count: int) -> list[Size]:
    """Return heights and widths like those of COCO's images at 800x1333.

    Most images are 640 px wide and 480 or 427 high, a fifth are in portrait format, and a fifth have random shapes.
    """
    rng = np.random.default_rng(0)
    usual = [(480, 640), (427, 640), (640, 480), (640, 427)]
    sizes = [usual[kind] for kind in rng.choice(4, count, p=[0.5, 0.28, 0.14, 0.08])]
    for index in rng.choice(count, count // 5, replace=False):
        ratio = float(np.exp(rng.normal(0.15, 0.35)).clip(0.4, 2.5))
        sizes[index] = (int(640 / ratio), 640) if ratio > 1 else (640, int(640 * ratio))
    return [SIZE.for_image(height, width) for height, width in sizes]


def padded_share(sizes: Sequence[Size], batches: Iterable[Sequence[int]]) -> float:
    """Return the area of batches over the area of their images; a batch is given as indices into `sizes`."""
    own = padded = 0
    for batch in batches:
        heights, widths = zip(*(sizes[index] for index in batch), strict=True)
        own += sum(height * width for height, width in zip(heights, widths, strict=True))
        padded += len(batch) * -(-max(heights) // 32) * 32 * -(-max(widths) // 32) * 32
    return padded / own


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description="Padding of batches.")
    parser.add_argument("--quick", action="store_true", help="1,000 images instead of 5,000")
    sizes = coco_like(1000 if parser.parse_args(arguments).quick else 5000)
    cases = {}
    for batch_size in BATCH_SIZES:
        grouped = BatchOrder(sizes, batch_size=batch_size, rank=0, world_size=1).batches()
        shuffled = np.random.default_rng(1).permutation(list(itertools.chain(*grouped))).reshape(-1, batch_size)
        cases[batch_size] = {
            "any": round(padded_share(sizes, shuffled.tolist()), 3),
            "similar": round(padded_share(sizes, grouped), 3),
        }
        print(f"{batch_size} images: {json.dumps(cases[batch_size])}", flush=True)
    worst = max(case["similar"] for case in cases.values())
    print(json.dumps({"benchmark": "padding", "ratio": worst, "goal": GOAL, "ok": worst <= GOAL, "cases": cases}))
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
