"""Whether a teacher knows the classes of a dataset, and the nearest names where it does not."""

import pytest

from defeat.rules.classes import class_map_findings


def found(classes: list[str], known: list[str], class_map: dict[str, str]) -> list[tuple[str, str]]:
    found = class_map_findings(classes, known, class_map)
    return [("/".join(map(str, one.path)), one.code) for one in found]


@pytest.mark.parametrize(
    ("classes", "known", "class_map", "errors"),
    [
        (["car", "person"], ["person", "dog", "car"], {}, []),
        (["auto", "person"], ["person", "car"], {"auto": "car"}, []),
        (["car", "person"], ["person", "car"], {"car": "person", "person": "car"}, []),  # names that changed places
        (["car", "person"], ["person", "car"], {"auto": "car"}, [("teacher/class_map/auto", "unknown_class")]),
        (["auto"], ["car"], {"auto": "cat"}, [("teacher/class_map/auto", "unknown_class")]),
        (["auto"], ["car"], {}, [("teacher", "teacher_classes_differ")]),
        (["car", "van"], ["car"], {"van": "car"}, [("teacher/class_map/van", "class_map_not_one_to_one")]),
        (
            ["lorry", "van"],
            ["car"],
            {"lorry": "car", "van": "car"},
            [("teacher/class_map/lorry", "class_map_not_one_to_one")],
        ),
        (["a/b"], ["car"], {"a/b": "cat"}, [("teacher/class_map/a/b", "unknown_class")]),
    ],
)
def test_class_maps(classes, known, class_map, errors):
    assert found(classes, known, class_map) == errors


def test_unknown_classes_are_told_the_nearest_names():
    (item,) = class_map_findings(["motorbike"], ["person", "motorcycle", "bike"], {})
    assert "class_map" in item.detail
    assert "For 'motorbike', nearest: 'motorcycle', 'bike'" in item.detail
    (item,) = class_map_findings(["x"], ["person", "motorcycle"], {"x": "motorcycl"})
    assert item.detail == "the teacher has no class 'motorcycl'; nearest: 'motorcycle'"
    (item,) = class_map_findings(["x"], [f"class {number}" for number in range(7)], {})
    assert item.detail.endswith("it has: 'class 0', 'class 1', 'class 2', 'class 3', 'class 4' and 2 more")


def test_thousands_of_wrong_classes_are_a_hundred_errors():
    wrong = {f"ours {number}": f"theirs {number}" for number in range(5000)}
    items = list(class_map_findings([], [], wrong))
    assert len(items) == 100
