"""Every setting of the service and its workers, from the environment, in one typed place."""

import os
import secrets
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pydantic import AliasChoices, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024
GIB = 1024 * MIB
HOUR_S = 60 * 60.0
DAY_S = 24 * HOUR_S
_LEAST_SECRET = 16


class Settings(BaseSettings):
    """Settings by environment variable.

    `DATABASE_URL`, `REDIS_URL` and `STORAGE_URL` go by their common names; everything else is prefixed `DEFEAT_`
    (`home` is `DEFEAT_HOME`); `none` is None. What is not set lies under `DEFEAT_HOME`.
    """

    model_config = SettingsConfigDict(
        env_prefix="DEFEAT_",
        env_parse_none_str="none",
        extra="ignore",
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    home: Path = Field(
        default=Path(".defeat"),
        description="Directory of the embedded stack: database, broker, objects, caches, the server's secret.",
    )
    database_url: str = Field(
        default="",
        validation_alias="DATABASE_URL",
        description="SQLAlchemy URL: postgresql+psycopg://… or sqlite:///…; default: SQLite under home.",
    )
    redis_url: str = Field(
        default="",
        validation_alias="REDIS_URL",
        description="Broker: redis://… or redis+socket:///path; default: the Valkey socket under home.",
    )
    storage_url: str = Field(
        default="",
        validation_alias="STORAGE_URL",
        description="Object store: file:///directory or s3://bucket/prefix; default: a directory under home.",
    )
    secret: SecretStr = Field(
        default=SecretStr(""),
        description="Secret that keys API-key hashes and dashboard sessions, at least 16 characters. Default: "
        "generated once under home.",
    )
    catalog: Path | None = Field(
        default=None,
        description="Catalog that the API validates jobs with, as `python -m defeat.engine.catalog FILE` wrote it, "
        "where the workers have DEFEAT_PLUGINS. None: the packaged one.",
    )
    dataset_roots: list[Path] = Field(
        default=[],
        description="Directories that `file://` datasets may lie in, as a JSON list. None: no `file://` datasets.",
    )
    max_upload_bytes: int = Field(default=20 * GIB, gt=0, description="Largest dataset archive or checkpoint, bytes.")
    max_unpacked_bytes: int = Field(
        default=100 * GIB, gt=0, description="Maximum size of an unpacked archive, bytes; a larger one is rejected."
    )
    max_unpacked_files: int = Field(
        default=2_000_000, gt=0, description="Maximum number of files in an archive; one with more is rejected."
    )
    lease_s: float = Field(default=30.0, gt=0, description="Duration of a worker's lease without renewal, seconds.")
    sweep_s: float = Field(default=10.0, gt=0, description="Time between two sweeps for lost rows, seconds.")
    redeliver_s: float = Field(
        default=120.0,
        gt=0,
        description="The sweep sends another message for a queued row whose last message is older than this, seconds.",
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        description="Consecutive attempts that may end by a lost worker or an infra failure, with no new training "
        "checkpoint between them, before the row fails.",
    )
    retry_backoff_s: float = Field(
        default=10.0,
        gt=0,
        description="Pause before the retry after an infra failure, seconds; it doubles with each consecutive failure.",
    )
    retry_backoff_max_s: float = Field(default=600.0, gt=0, description="Maximum of these pauses, seconds.")
    storage_patience_s: float = Field(
        default=900.0,
        ge=0,
        description="How long a worker retries an object store that fails, to fetch a run's inputs or to store its "
        "outputs, seconds; then another attempt resumes from the last training checkpoint.",
    )
    cancel_grace_s: float = Field(
        default=20.0,
        gt=0,
        description="How long a cancelled run may take to save and exit before the worker kills it, seconds.",
    )
    retention_s: float = Field(
        default=3600.0, gt=0, description="Time between two passes of the retention rules below, seconds."
    )
    keep_training_checkpoints_s: float | None = Field(
        default=30 * DAY_S,
        ge=0,
        description="How long an ended job keeps the training checkpoint that a retry would resume from, seconds. "
        "None: forever.",
    )
    keep_empty_uploads_s: float | None = Field(
        default=7 * DAY_S,
        ge=HOUR_S,
        description="How long a dataset or checkpoint may wait for its content before it is deleted, seconds, at least "
        "3600. None: forever.",
    )
    keep_failed_uploads_s: float | None = Field(
        default=30 * DAY_S,
        ge=0,
        description="How long the upload of a dataset or checkpoint whose check failed is kept, seconds. None: "
        "forever.",
    )
    keep_orphans_s: float | None = Field(
        default=7 * DAY_S,
        ge=HOUR_S,
        description="How long an object that no row refers to stays in the store, seconds, at least 3600. None: "
        "forever.",
    )
    keep_history_s: float | None = Field(
        default=None,
        ge=0,
        description="How long an ended job keeps all its metrics and events; later it keeps `history_points` of each "
        "series, and its warnings, errors and last events, seconds. None: forever.",
    )
    history_points: int = Field(
        default=1000,
        ge=2,
        le=10_000,
        description="Points of each metric, and events, that a reduced history keeps.",
    )
    keep_teachers_s: float | None = Field(
        default=None,
        ge=0,
        description="How long a checkpoint that a job trained as its teacher is kept when no job's spec names it, from "
        "its end or its last download, seconds. None: forever.",
    )
    quota_queued_jobs: int | None = Field(
        default=None, ge=0, description="Jobs that a tenant may have queued at once. None: no limit."
    )
    quota_uploads: int | None = Field(
        default=None,
        ge=0,
        description="Datasets and checkpoints of a tenant that may wait for their content at once. None: no limit.",
    )
    quota_datasets: int | None = Field(
        default=None, ge=0, description="Datasets that a tenant may have. None: no limit."
    )
    quota_storage_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Bytes of datasets, checkpoints and artifacts from which on a tenant may add none. None: no limit.",
    )
    device: str = Field(default="auto", description="Device of runs: auto, cpu, cuda or cuda:N.")
    labels: list[str] = Field(
        default=[],
        description="Labels of this worker, as a JSON list: a job with `resources.label` runs on a worker that has "
        "this label.",
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Maximum `resources.gpus` of a job that this worker takes. None: its number of GPUs, or, without "
        "a GPU, its number of cores.",
    )
    max_job_gpus: int = Field(default=64, ge=1, description="The API rejects jobs that ask for more GPUs than this.")
    max_job_gpu_memory_gb: float | None = Field(
        default=None, gt=0, description="The API rejects jobs that ask for more memory per GPU, GB. None: no limit."
    )
    worker_silent_s: float = Field(
        default=600.0, gt=0, description="The sweep removes a worker that has not reported for this long, seconds."
    )
    image_memory_bytes: int | None = Field(
        default=None,
        # The second is the name of 0.1; it goes with 0.3.
        validation_alias=AliasChoices("DEFEAT_IMAGE_MEMORY_BYTES", "DEFEAT_PICTURE_MEMORY_BYTES"),
        ge=0,
        description="Maximum memory for decoded images in a run, bytes. None: 2 GiB or a quarter of the free "
        "memory, whichever is less.",
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port that serves /metrics, without a key. None: no /metrics."
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address that serves /metrics. Keep it private: it counts what all tenants do.",
    )
    log_level: str = Field(default="INFO", description="Minimum log level: DEBUG, INFO, WARNING or ERROR.")

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, secret: SecretStr) -> SecretStr:
        # Empty is not set. The value itself must not get into the message.
        if 0 < len(secret) < _LEAST_SECRET:
            raise ValueError(
                f"it has {len(secret)} characters, and sessions can be forged with a secret that is guessed: give at "
                f"least {_LEAST_SECRET} random ones, or leave it out and one is made"
            )
        return secret

    @model_validator(mode="after")
    def _fill_from_home(self) -> "Settings":
        self.home = self.home.expanduser().resolve()
        self.database_url = self.database_url or f"sqlite:///{self.home / 'defeat.sqlite3'}"
        self.redis_url = self.redis_url or f"redis+socket://{self.broker_socket}"
        self.storage_url = self.storage_url or (self.home / "objects").as_uri()
        return self

    @property
    def broker_socket(self) -> Path:
        """Unix socket of the embedded broker. The kernel allows about 107 characters of path."""
        return self.home / "broker.sock"

    @property
    def scratch(self) -> Path:
        """Directory for run directories, upload parts and the dataset cache: may be lost at any time."""
        return self.home / "scratch"

    def secret_bytes(self) -> bytes:
        """Return the server's secret; without `DEFEAT_SECRET`, one is made under home (mode 0600) and kept."""
        if value := self.secret.get_secret_value():
            return value.encode()
        path = self.home / "secret"
        self.home.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Linked into place whole: another process starting now must never read an empty secret.
            part = self.home / f"secret.{secrets.token_hex(8)}"
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):
                path.hardlink_to(part)
            part.unlink()
        return path.read_bytes()


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Return the process's settings, read from the environment once."""
    return Settings()
