"""Tiny datasets on disk, and archives of them."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 64, 48
VocBox = tuple[str, float, float, float, float]


def image_bytes(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT), kind: str = "PNG") -> bytes:
    """Return an image whose bytes depend on `seed`."""
    image = Image.new("RGB", size, (seed * 7 % 256, seed * 31 % 256, seed % 256))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def voc_xml(
    boxes: Sequence[VocBox], *, name: str = "a.png", size: tuple[int, int] = (WIDTH, HEIGHT), more: str = ""
) -> str:
    objects = "".join(
        f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, x1, y1, x2, y2 in boxes
    )
    return (
        f"<annotation><filename>{name}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        f"{objects}{more}</annotation>"
    )


GOOD_BOX: VocBox = ("cell", 4, 5, 20, 30)


def voc(root: Path, splits: Mapping[str, Mapping[str, Sequence[VocBox]]] | None = None) -> Path:
    """Write a VOC dataset: two training images and one for validation, unless `splits` says otherwise."""
    splits = splits or {
        "train": {"one": [GOOD_BOX, ("blob", 1, 1, 9, 9)], "two": [("cell", 10, 10, 40, 40)]},
        "val": {"three": [("cell", 0, 0, WIDTH, HEIGHT)]},
    }
    seed = 0
    for split, images in splits.items():
        put(root / "ImageSets/Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in images))
        for stem, boxes in images.items():
            seed += 1
            put(root / "JPEGImages" / f"{stem}.png", image_bytes(seed))
            put(root / "Annotations" / f"{stem}.xml", voc_xml(boxes, name=f"{stem}.png"))
    return root


def coco_document(files: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Return a COCO document with one good box (category 3 of 3 and 7) on each file; `changes` replace its lists."""
    document: dict[str, Any] = {
        "categories": [{"id": 7, "name": "blob"}, {"id": 3, "name": "cell"}],
        "images": [
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} for number, name in enumerate(files, 1)
        ],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 3, "bbox": [4, 5, 16, 25], "iscrowd": 0}
            for number in range(1, len(files) + 1)
        ],
    }
    return {**document, **changes}


def coco(root: Path, **train_changes: Any) -> Path:
    """Write a COCO dataset: two training images and one for validation."""
    files = {"train2017": ["a.png", "b.png"], "val2017": ["c.png"]}
    seed = 0
    for tag, names in files.items():
        changes = train_changes if tag == "train2017" else {}
        put(root / "annotations" / f"instances_{tag}.json", json.dumps(coco_document(names, **changes)))
        for name in names:
            seed += 1
            put(root / tag / name, image_bytes(seed))
    return root


def zip_of(root: Path, path: Path, *, prefix: str = "", backwards: bool = False) -> Path:
    files = sorted((file for file in root.rglob("*") if file.is_file()), reverse=backwards)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def tar_of(root: Path, path: Path, mode: str = "w", *, prefix: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        archive.add(root, prefix or ".")
    return path


def tar_with(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    """Write a tar of exactly these members."""
    with tarfile.open(path, mode) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
