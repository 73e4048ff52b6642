"""Resolves a spec as it was sent to one that a worker can run: reports every mistake, fills in every default."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.assets import checked_id
from app.checkpoints import repository as checkpoints
from app.checkpoints.service import CheckpointNotReady, not_ready
from app.datasets import repository as datasets
from app.errors import Conflict, NotFound
from app.models import Checkpoint, Dataset
from app.request_models import Problem, invalid, pointer, problem, problems_of
from app.settings import Settings
from app.specs.catalog import Catalog
from app.specs.initial_weights import tensor_problems
from app.specs.job import JobSpec
from app.specs.methods import Chosen, check_methods
from app.specs.pairing import pair_problems
from app.specs.training import training_problems
from app.specs.validation import FORM_CODES, Section, check_detector, check_section, problem_of, unknown_choice
from app.states import AWAITING_UPLOAD, READY
from defeat.rules import Finding, Path, show
from defeat.rules.classes import CLASS_MAP, class_map_findings, unknown_classes
from defeat.rules.distillation import no_teacher
from defeat.rules.training import batch_shares

# Parts of a spec whose schemas are the catalog's own sections.
SECTIONS = ("schedule", "evaluation", "augmentation", "resources")


class DatasetNotReady(Conflict):
    """The dataset cannot be trained on, or not yet."""

    code, title = "dataset_not_ready", "Dataset not ready"


@dataclass(frozen=True)
class Resolved:
    """A complete spec, and its dataset."""

    spec: dict[str, Any]
    dataset: Dataset


@dataclass
class _Teacher:
    """What is known of the teacher: None where that part is wrong or not known before training."""

    detector: dict[str, Any] | None = None
    classes: list[str] | None = None
    schedule: dict[str, Any] | None = None


class Resolver:
    """Resolves one spec for one tenant. Used once.

    A wrong part is reported and then counts as unknown, so that the parts that do not depend on it are still checked.
    """

    def __init__(
        self, session: Session, tenant_id: str, catalog: Catalog, body: dict[str, Any], settings: Settings
    ) -> None:
        self._session = session
        self._settings = settings
        self._tenant_id = tenant_id
        self._catalog = catalog
        self._body = body
        self._errors: list[Problem] = []
        self._conflicts: list[Conflict] = []

    def resolve(self) -> Resolved:
        """Return the complete spec.

        Raises `Invalid` with every mistake in it; where there is none, `DatasetNotReady` or `CheckpointNotReady`.
        """
        outer = self._outer()
        dataset = self._dataset()
        student = self._detector(("student", "detector"))
        self._initial_weights("student", student, dataset)
        methods = self._methods()
        teacher = self._teacher(methods, dataset)
        parts = {name: self._parameters(name, (name,)) for name in SECTIONS}
        self._check_splits(dataset, parts["evaluation"])
        self._check_limits(parts["resources"])
        self._check_shares(("schedule",), parts["schedule"], parts["resources"])
        self._check_shares(("teacher", "schedule"), teacher.schedule, parts["resources"])
        self._check_training(("student",), ("schedule",), student, parts["schedule"], parts, dataset)
        trained = (("teacher",), ("teacher", "schedule"), teacher.detector, teacher.schedule)
        self._check_training(*trained, parts, dataset)
        self._check_classes(dataset, teacher)
        self._check_pair(methods, student, teacher)
        self._raise()
        assert outer is not None
        assert dataset is not None
        distillation = [method.value for method in methods]
        is_list = isinstance(outer.distillation, list)
        spec = outer.model_dump() | parts | {"distillation": distillation if is_list else distillation[0]}
        spec["student"]["detector"] = student
        if spec["teacher"] is not None and spec["teacher"]["source"] != "pretrained":
            spec["teacher"]["detector"] = teacher.detector
        if teacher.schedule is not None:
            spec["teacher"]["schedule"] = teacher.schedule
        return Resolved(spec, dataset)

    def _error(self, path: Path, code: str, detail: str) -> None:
        self._errors.append(problem(pointer(path), code, detail))

    def _found(self, findings: Iterable[Finding]) -> None:
        self._errors.extend(map(problem_of, findings))

    def _raise(self) -> None:
        if self._errors:
            codes = {error["code"] for error in self._errors}
            rule = codes.pop() if len(codes) == 1 and not codes & FORM_CODES else None
            raise invalid(self._errors, code=rule)
        for conflict in self._conflicts:
            raise conflict

    def _outer(self) -> JobSpec | None:
        try:
            return JobSpec.model_validate(self._body)
        except ValidationError as error:
            self._errors.extend(problems_of(error))
            if any(item["code"] == "unfit_value" for item in self._errors):
                self._raise()
            return None

    def _given(self, path: Path) -> Any:
        """Return the value at `path`; None if there is none, or a value on the way is not an object."""
        value: Any = self._body
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _section(self, check: Callable[[object, Path], Section], path: Path) -> dict[str, Any] | None:
        value = self._given(path)
        if not isinstance(value, dict):  # missing or of a wrong type: the outer model reports it
            return None
        section = check(value, path)
        self._errors.extend(section.problems)
        return section.value

    def _detector(self, path: Path) -> dict[str, Any] | None:
        return self._section(lambda value, at: check_detector(self._catalog, value, at), path)

    def _parameters(self, name: str, path: Path) -> dict[str, Any] | None:
        schema = self._catalog.schema(name)
        parent = self._given(path[:-1])
        if isinstance(parent, dict) and path[-1] not in parent:
            return check_section(schema, {}, path).value
        return self._section(lambda value, at: check_section(schema, value, at), path)

    def _dataset(self) -> Dataset | None:
        dataset_id = self._given(("dataset",))
        if not isinstance(dataset_id, str):
            return None
        row = self._find(datasets.find_to_use, dataset_id)
        if row is None:
            detail = f"there is no dataset {show(dataset_id)}; GET /v1/datasets lists yours"
            self._error(("dataset",), "dataset_not_found", detail)
        elif row.status != READY:
            reason = f": {row.failure.get('detail')}" if row.failure else ""
            hint = "; send its archive first" if row.status == AWAITING_UPLOAD else ""
            self._conflicts.append(DatasetNotReady(f"{row.id} is {row.status}{reason}{hint}"))
        return row

    def _find(self, find: Callable[[Session, str, str], Any], row_id: str) -> Any:
        try:
            return find(self._session, self._tenant_id, checked_id(row_id))
        except NotFound:
            return None

    def _checkpoint(self, path: Path, checkpoint_id: str) -> Checkpoint | None:
        row: Checkpoint | None = self._find(checkpoints.find_to_use, checkpoint_id)
        if row is None:
            detail = f"there is no checkpoint {show(checkpoint_id)}; GET /v1/checkpoints lists yours"
            self._error(path, "checkpoint_not_found", detail)
        elif row.status != READY:
            self._conflicts.append(CheckpointNotReady(not_ready(row)))
        return row

    def _initial_weights(self, whose: str, detector: dict[str, Any] | None, dataset: Dataset | None) -> None:
        path = (whose, "initial_weights")
        value = self._given(path)
        if not isinstance(value, str) or not value.startswith("ckpt_"):
            return
        row = self._checkpoint(path, value)
        if row is None or row.status != READY:
            return
        if detector is not None and row.detector is not None:
            self._errors.extend(tensor_problems(self._catalog, path, detector, row.detector))
        if dataset is not None and dataset.classes is not None and row.classes is not None:
            self._found(unknown_classes(path, dataset.classes, row.classes))

    def _methods(self) -> list[Chosen]:
        chosen, problems = check_methods(self._catalog, self._given(("distillation",)), ("distillation",))
        self._errors.extend(problems)
        return chosen

    def _teacher(self, methods: list[Chosen], dataset: Dataset | None) -> _Teacher:
        if self._given(("teacher",)) is None:
            needs_teacher = {name: entry["needs_teacher"] for name, entry in self._catalog.methods.items()}
            self._found(no_teacher([method.name for method in methods], needs_teacher))
        source = self._given(("teacher", "source"))
        if source == "train":
            detector = self._detector(("teacher", "detector"))
            self._initial_weights("teacher", detector, dataset)
            return _Teacher(detector=detector, schedule=self._parameters("schedule", ("teacher", "schedule")))
        if source == "checkpoint":
            return self._checkpoint_teacher()
        if source == "pretrained":
            return self._pretrained_teacher()
        return _Teacher()

    def _checkpoint_teacher(self) -> _Teacher:
        checkpoint_id = self._given(("teacher", "id"))
        row = self._checkpoint(("teacher", "id"), checkpoint_id) if isinstance(checkpoint_id, str) else None
        given = self._detector(("teacher", "detector"))
        if row is None or row.status != READY:
            return _Teacher()
        if given is not None and given != row.detector:
            detail = f"this is not the detector of {row.id}; leave `detector` out, it comes with the checkpoint"
            self._error(("teacher", "detector"), "teacher_detector_differs", detail)
        return _Teacher(detector=row.detector, classes=row.classes)

    def _pretrained_teacher(self) -> _Teacher:
        name, weights = self._given(("teacher", "detector")), self._given(("teacher", "weights"))
        if not isinstance(name, str) or not isinstance(weights, str):
            return _Teacher()
        entry = self._catalog.pretrained.get(name)
        if entry is None:
            self._errors.append(unknown_choice(("teacher", "detector"), name, list(self._catalog.pretrained)))
            return _Teacher()
        if weights not in entry["weights"]:
            self._errors.append(unknown_choice(("teacher", "weights"), weights, list(entry["weights"])))
            return _Teacher(detector=entry["detector"])
        return _Teacher(detector=entry["detector"], classes=entry["weights"][weights]["classes"])

    def _check_splits(self, dataset: Dataset | None, evaluation: dict[str, Any] | None) -> None:
        if dataset is None or dataset.splits is None:
            return
        wanted: list[tuple[Path, str]] = [(("dataset",), "train")]
        if evaluation is not None:
            wanted.append((("evaluation", "split"), evaluation["split"]))
        for path, split in wanted:
            if split not in dataset.splits:
                detail = f"{dataset.id} has no split {split!r}; it has: {', '.join(dataset.splits) or 'none'}"
                self._error(path, "split_missing", detail)

    def _check_shares(self, path: Path, schedule: dict[str, Any] | None, resources: dict[str, Any] | None) -> None:
        if schedule is None or resources is None:
            return
        shared = batch_shares(
            schedule["batch_size"], gpus=resources["gpus"], accumulation=schedule["accumulation"], where=path
        )
        self._found(shared)

    def _check_limits(self, resources: dict[str, Any] | None) -> None:
        most = {"gpus": self._settings.max_job_gpus, "gpu_memory_gb": self._settings.max_job_gpu_memory_gb}
        for key, limit in most.items():
            asked = None if resources is None else resources[key]
            if limit is not None and asked is not None and asked > limit:
                detail = f"no job may ask for more than {limit:g} here; got {show(asked)}"
                self._error(("resources", key), "out_of_range", detail)

    def _check_training(
        self,
        who: Path,
        where: Path,
        detector: dict[str, Any] | None,
        schedule: dict[str, Any] | None,
        parts: dict[str, dict[str, Any] | None],
        dataset: Dataset | None,
    ) -> None:
        resources = parts["resources"]
        if detector is None or schedule is None or resources is None:
            return
        splits = (dataset.splits or {}) if dataset else {}
        found = training_problems(
            self._catalog,
            detector,
            schedule,
            initial_weights=self._given((*who, "initial_weights")),
            gpus=resources["gpus"],
            images=splits["train"]["images"] if "train" in splits else None,
            augmentation=parts["augmentation"],
            who=who,
            where=where,
        )
        self._errors.extend(found)

    def _check_classes(self, dataset: Dataset | None, teacher: _Teacher) -> None:
        if dataset is None or dataset.classes is None or teacher.classes is None:
            return
        given = self._given(CLASS_MAP)
        class_map = given if isinstance(given, dict) else {}
        if all(isinstance(name, str) for name in class_map.values()):  # else the outer model reports it
            self._found(class_map_findings(dataset.classes, teacher.classes, class_map))

    def _check_pair(self, methods: list[Chosen], student: dict[str, Any] | None, teacher: _Teacher) -> None:
        if student is None or teacher.detector is None:
            return
        is_free = self._given(("teacher", "source")) == "train"
        for error in pair_problems(self._catalog, methods, student, teacher.detector, teacher_is_free=is_free):
            if error not in self._errors:  # two methods may want the same
                self._errors.append(error)


def resolve(session: Session, tenant_id: str, catalog: Catalog, body: dict[str, Any], settings: Settings) -> Resolved:
    """Return the complete form of a job's spec as its tenant sent it. Raises as `Resolver.resolve`."""
    return Resolver(session, tenant_id, catalog, body, settings).resolve()
