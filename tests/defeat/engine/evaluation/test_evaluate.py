"""Our metrics against pycocotools, the reference; what is kept of a split."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from defeat.engine.data.canonical import AnnotatedImage, Box, CanonicalDataset
from defeat.engine.data.loading.loader import ImageReader
from defeat.engine.data.masks import from_text, to_text
from defeat.engine.evaluation import evaluate
from defeat.engine.evaluation.evaluate import coco_metrics, detect_split
from defeat.engine.evaluation.mask_intersections import mask_intersections
from tests.support.reference import STATS, coco_evaluation, to_coco, to_results
from tests.support.training import shapes


def random_case(seed, count=30, classes=3):
    """A dataset with boxes of all sizes and crowds, and detections near them, with ties in score and false ones."""
    rng = np.random.default_rng(seed)
    images, found = [], {}
    for number in range(1, count + 1):
        boxes, guesses = [], []
        for _ in range(int(rng.integers(0, 6))):
            x, y = rng.uniform(0, 400, 2)
            w, h = rng.uniform(5, 220, 2)
            kind = int(rng.integers(classes - 1))  # the last class has no ground truth
            boxes.append(Box(kind, x, y, x + w, y + h, crowd=bool(rng.random() < 0.1)))
            for _ in range(int(rng.integers(0, 3))):
                dx, dy, dw, dh = rng.normal(0, 0.08, 4) * (w, h, w, h)
                guesses.append([x + dx, y + dy, x + w + dw, y + h + dh, int(rng.integers(classes)) + 1])
        for _ in range(int(rng.integers(0, 4))):
            x, y = rng.uniform(0, 400, 2)
            guesses.append([x, y, x + 30, y + 40, int(rng.integers(classes)) + 1])
        scores = np.round(rng.random(len(guesses)), 2).astype(np.float32)
        table = torch.tensor(guesses, dtype=torch.float32).reshape(-1, 5)
        found[number] = {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": torch.from_numpy(scores)}
        images.append(AnnotatedImage(number, f"images/{number:064x}.png", str(number), 640, 640, "val", tuple(boxes)))
    return CanonicalDataset(tuple("abcdef"[:classes]), tuple(images)), found


def crowded_case(seed, count=6):
    """Boxes on a coarse grid: equal overlaps and scores, many on one spot, and more detections than are counted."""
    rng = np.random.default_rng(seed)
    sides = np.array([16, 32, 96, 128])  # 32 and 96 squared are bounds of the ranges of areas
    images, found = [], {}
    for number in range(1, count + 1):
        where, side = rng.integers(0, 4, (25, 2)) * 32, rng.choice(sides, (25, 2))
        crowds = rng.random(25) < 0.2
        boxes = tuple(
            Box(0, *map(float, (*corner, *(corner + size))), crowd=bool(crowd))
            for corner, size, crowd in zip(where, side, crowds, strict=True)
        )
        corner, size = rng.integers(0, 8, (140, 2)) * 16, rng.choice(sides, (140, 2))
        found[number] = {
            "boxes": torch.from_numpy(np.concatenate([corner, corner + size], axis=1)).float(),
            "labels": torch.ones(140, dtype=torch.int64),
            "scores": torch.from_numpy(np.round(rng.random(140), 1)).float(),
        }
        images.append(AnnotatedImage(number, f"images/{number:064x}.png", str(number), 640, 640, "val", boxes))
    # An image without truth and one without detections.
    images.append(AnnotatedImage(count + 1, "images/x.png", "x", 640, 640, "val", ()))
    found[count + 1] = found[1]
    found[2] = {name: tensor[:0] for name, tensor in found[2].items()}
    return CanonicalDataset(("only", "never"), tuple(images)), found


@pytest.mark.parametrize("case", [random_case, crowded_case])
@pytest.mark.parametrize("seed", range(5))
def test_all_numbers_equal_pycocotools(seed, case):
    dataset, found = case(seed)
    ours = coco_metrics(dataset, "val", found)
    theirs = coco_evaluation(to_coco(dataset, "val"), to_results(found))
    for name, value in zip(STATS, theirs.stats, strict=True):
        assert (ours[name] if ours[name] is not None else -1) == pytest.approx(value, abs=1e-9), name
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for index, entry in enumerate(ours["per_class"]):
        there = precision[:, :, index]
        expected = there[there > -1].mean() if (there > -1).any() else None
        assert entry["ap"] == (pytest.approx(expected, abs=1e-9) if expected is not None else None)
    assert ours["per_class"][-1]["ap"] is None  # no ground truth: nothing to measure, not 0
    assert ours["images"] == len(dataset.images)


def masked_case(seed, count=12, size=(90, 120)):
    """Round objects, some without an outline, some crowds; and detections with masks of their own near them."""
    rng = np.random.default_rng(seed)
    images, found = [], {}
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    for number in range(1, count + 1):
        boxes, guesses = [], []
        for _ in range(int(rng.integers(1, 6))):
            (w, h), kind = rng.uniform(6, 60, 2), int(rng.integers(2))
            x, y = rng.uniform(0, size[1] - w), rng.uniform(0, size[0] - h)
            inside = ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25
            crowd = bool(rng.random() < 0.15)
            mask = None if crowd or rng.random() < 0.2 else to_text(runs_of_bitmap(inside))
            boxes.append(Box(kind, x, y, x + w, y + h, crowd=crowd, mask=mask))
            for _ in range(int(rng.integers(1, 4))):
                dx, dy = rng.normal(0, 0.1, 2) * (w, h)
                guesses.append([x + dx, y + dy, x + w + dx, y + h + dy, int(rng.random() < 0.2) ^ kind])
        table = torch.tensor(guesses, dtype=torch.float32)
        across = torch.linspace(-1, 1, 28)
        round_ = 0.5 + (0.8 - across[:, None] ** 2 - across**2) / 2
        images.append(
            AnnotatedImage(number, f"images/{number:064x}.png", str(number), size[1], size[0], "val", tuple(boxes))
        )
        found[number] = {
            "boxes": table[:, :4],
            "labels": table[:, 4].long() + 1,
            "scores": torch.from_numpy(np.round(rng.random(len(guesses)), 2)).float(),
            "masks": (round_ + 0.2 * torch.from_numpy(rng.normal(size=(len(guesses), 28, 28))).float()).clamp(0, 1),
        }
    return CanonicalDataset(("a", "b"), tuple(images)), found


def runs_of_bitmap(bitmap):
    counts = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))["counts"]
    return from_text(counts.decode())


@pytest.mark.parametrize("seed", range(4))
def test_the_masks_numbers_equal_pycocotools(seed):
    dataset, found = masked_case(seed)
    seen = {
        image.id: {**found[image.id], "mask_intersections": mask_intersections(found[image.id], image)}
        for image in dataset.images
    }
    ours = coco_metrics(dataset, "val", seen)

    truth, results = to_coco(dataset, "val"), to_results(found)
    size = (dataset.images[0].height, dataset.images[0].width)
    every = [box for image in dataset.images for box in image.boxes]
    for annotation, box in zip(truth["annotations"], every, strict=True):
        bitmap = np.zeros(size, np.uint8, order="F")
        x1, y1, x2, y2 = (round(side) for side in (box.x1, box.y1, box.x2, box.y2))
        bitmap[y1:y2, x1:x2] = 1  # of those that are not outlined: they are crowds, and their boxes their masks
        rle = coco_mask.encode(bitmap) if box.mask is None else {"size": list(size), "counts": box.mask}
        annotation |= {"segmentation": rle, "area": float(coco_mask.area(rle)), "iscrowd": int(box.mask is None)}
    spread = torch.cat([paste_masks_in_image(one["masks"][:, None], one["boxes"], size) for one in found.values()])
    for result, mask in zip(results, spread[:, 0] >= 0.5, strict=True):
        result["segmentation"] = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        del result["bbox"]
    theirs = coco_evaluation(truth, results, "segm")
    assert theirs.stats[0] > 0.05
    for name, value in zip(STATS, theirs.stats, strict=True):
        found_value = ours["masks"][name]
        assert (found_value if found_value is not None else -1) == pytest.approx(value, abs=1e-9), name
    # The boxes' numbers do not change for it.
    assert {**ours, "masks": None} == {**coco_metrics(dataset, "val", found), "masks": None}


def test_no_detections_is_zero_and_no_error():
    dataset, found = random_case(0)
    empty = {
        number: {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        for number in found
    }
    metrics = coco_metrics(dataset, "val", empty)
    assert metrics["ap"] == 0.0
    assert metrics["detections"] == 0


def test_images_decoded_ahead_are_the_same(tmp_path):
    dataset = shapes(tmp_path, train=2, val=9)
    reader = ImageReader(tmp_path / "canonical", dataset.in_split("val"))
    plain, ahead = list(reader.read_all(range(9))), list(reader.read_all(range(9), ahead=4))
    assert len(plain) == len(ahead) == 9
    assert all(torch.equal(one, other) for one, other in zip(plain, ahead, strict=True))


class Shown:
    """A detector that finds one box in each image's corner, as wide as the image."""

    trains_masks = False

    def eval(self):
        return self

    def detect(self, images):
        whole = torch.tensor([[0.0, 0.0, image.shape[-1], image.shape[-2]] for image in images])
        return [
            {"boxes": whole[index : index + 1], "labels": torch.tensor([1 + index % 2]), "scores": image.mean()[None]}
            for index, image in enumerate(images)
        ]


def test_what_is_seen_in_a_split_has_memory_of_its_own(tmp_path):
    """Else each image's three numbers would take the whole batch's along to another process."""
    reader = ImageReader(tmp_path / "canonical", shapes(tmp_path, train=1, val=7).in_split("val"))
    found = detect_split(Shown(), reader, batch_size=3, device=torch.device("cpu"))
    assert sorted(found) == [image.id for image in reader.images]
    for index, image in enumerate(reader.images):
        seen = found[image.id]
        assert seen["boxes"].tolist() == [[0, 0, 96, 64]]
        assert seen["labels"].tolist() == [1 + index % 3 % 2]
        assert seen["scores"].item() == pytest.approx(reader.read(index).float().mean().item() / 255, rel=1e-5)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in seen.values())


def test_images_cross_to_a_gpu_by_one_copy_a_batch(tmp_path, monkeypatch):
    reader = ImageReader(tmp_path / "canonical", shapes(tmp_path, train=1, val=6).in_split("val"))
    copies = []

    class Counted(evaluate.Batch):
        def pin_memory(self):
            return self

        def to(self, device):
            copies.append((device.type, len(self)))
            return self

    monkeypatch.setattr(evaluate, "Batch", Counted)
    monkeypatch.setattr(evaluate, "numerics", lambda *_: nullcontext())
    detect_split(Shown(), reader, batch_size=4, device=torch.device("cuda"))
    assert copies == [("cuda", 4), ("cuda", 2)]
