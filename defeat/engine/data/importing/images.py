"""Opening of images that nobody vouches for: each is decoded once, whole, before anything trains on it.

Images are used as stored: an EXIF orientation is not applied, and width and height are those of the stored pixels.
"""

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile

from defeat.engine.data.archive import Tick
from defeat.engine.report import shown

# The formats that are read, by Pillow's name, and the extension under which they are kept. Never Pillow's whole list:
# some of its decoders start other programs.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}

MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 512 * 1024 * 1024

# A decoded image takes 4 bytes a pixel: one at a time of the very large ones.
_LARGE_PIXELS = 25_000_000
_one_large = threading.Lock()


@dataclass(frozen=True, slots=True)
class Inspected:
    """An image that decodes.

    Attributes:
        sha256: of the file's bytes, in hex.
        extension: by the content, without a dot.
        width, height: pixels, as stored.
    """

    sha256: str
    extension: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Fault:
    """An image that cannot be used: `code` is a problem's code."""

    code: str
    detail: str


def inspect(path: Path) -> Inspected | Fault:
    """Decode one image."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        return Fault("image_too_large", f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        data = path.read_bytes()
    except PermissionError:
        return Fault("broken_image", "the service may not read the file")
    try:
        return _decode(data)
    except MemoryError:
        raise
    except Exception as error:
        # A decoder may raise anything at all on hostile bytes, and every such case means the same.
        return Fault("broken_image", f"the image does not decode: {shown(f'{type(error).__name__}: {error}')}")


def _decode(data: bytes) -> Inspected | Fault:
    with Image.open(BytesIO(data), formats=[name for name in EXTENSIONS if name != "MPO"]) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            return Fault("image_too_large", f"{width}x{height} pixels; at most {MAX_PIXELS} are decoded")
        with _one_large if width * height > _LARGE_PIXELS else nullcontext():
            image.load()
        extension = EXTENSIONS[image.format or ""]
    return Inspected(hashlib.sha256(data).hexdigest(), extension, width, height)


def inspect_all(paths: Iterable[Path], tick: Tick) -> dict[Path, Inspected | Fault]:
    """Decode every image once, on all processors; `tick` gets the fraction done, in this thread, and may raise."""
    unique = list(dict.fromkeys(paths))
    found: dict[Path, Inspected | Fault] = {}
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = None  # `_decode` checks our own limit, between reading the header and decoding
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for path, result in zip(unique, pool.map(inspect, unique), strict=True):
            found[path] = result
            tick(len(found) / len(unique))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found
