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
        description="Secret that keys API-key hashes and dashboard sessions, at least 16 characters. Default: made "
        "once under home.",
    )
    dataset_roots: list[Path] = Field(
        default=[],
        description="Directories that `file://` datasets may lie in, as a JSON list. None: no `file://` datasets.",
    )
    max_upload_bytes: int = Field(default=20 * GIB, gt=0, description="Largest dataset archive or checkpoint, bytes.")
    max_unpacked_bytes: int = Field(
        default=100 * GIB, gt=0, description="Most bytes that one archive may unpack to; more is refused."
    )
    max_unpacked_files: int = Field(default=2_000_000, gt=0, description="Most files in one archive; more is refused.")
    lease_s: float = Field(default=30.0, gt=0, description="How long a worker's claim holds without renewal, seconds.")
    sweep_s: float = Field(default=10.0, gt=0, description="Time between two sweeps for lost work, seconds.")
    redeliver_s: float = Field(
        default=120.0, gt=0, description="A queued row whose last message is older than this is sent again, seconds."
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        description="Attempts in a row that may end by a lost worker or an infra failure, with no new training "
        "checkpoint between them, before a row is given up as failed.",
    )
    retry_backoff_s: float = Field(
        default=10.0,
        gt=0,
        description="Pause before a row is tried again after an infra failure, seconds; doubled with each in a row.",
    )
    retry_backoff_max_s: float = Field(default=600.0, gt=0, description="Longest of these pauses, seconds.")
    storage_patience_s: float = Field(
        default=900.0,
        ge=0,
        description="How long a worker waits for an object store that refuses or does not answer, to fetch a run's "
        "inputs or to store what it left, seconds; after that another attempt goes on from the last training "
        "checkpoint.",
    )
    cancel_grace_s: float = Field(
        default=20.0,
        gt=0,
        description="How long a cancelled run may take to save and end before it is killed, seconds.",
    )
    retention_s: float = Field(
        default=3600.0, gt=0, description="Time between two passes that delete what the rules below let go, seconds."
    )
    keep_training_checkpoints_s: float | None = Field(
        default=30 * DAY_S,
        ge=0,
        description="How long an ended job keeps the training checkpoint that it could go on from, seconds. None: for "
        "ever.",
    )
    keep_empty_uploads_s: float | None = Field(
        default=7 * DAY_S,
        ge=HOUR_S,
        description="How long a dataset or checkpoint may wait for its content before it is deleted, seconds, at least "
        "3600. None: for ever.",
    )
    keep_failed_uploads_s: float | None = Field(
        default=30 * DAY_S,
        ge=0,
        description="How long the upload of a dataset or checkpoint whose check failed is kept, seconds. None: for "
        "ever.",
    )
    keep_orphans_s: float | None = Field(
        default=7 * DAY_S,
        ge=HOUR_S,
        description="How long an object that no row refers to stays in the store, seconds, at least 3600. None: for "
        "ever.",
    )
    keep_history_s: float | None = Field(
        default=None,
        ge=0,
        description="How long an ended job keeps all its metrics and events; later it keeps `history_points` of each "
        "series, and its warnings, errors and last events, seconds. None: for ever.",
    )
    history_points: int = Field(
        default=1000,
        ge=2,
        le=10_000,
        description="Metrics of one series, and events, that a job's reduced history keeps.",
    )
    keep_teachers_s: float | None = Field(
        default=None,
        ge=0,
        description="How long a checkpoint that a job trained as its teacher is kept when no job's spec names it, from "
        "its end or its last download, seconds. None: for ever.",
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
        description="What this worker is called in a job's `resources.label`, as a JSON list: a job with a label "
        "runs on a worker that has it.",
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Most `resources.gpus` of a job that this worker takes. None: its GPUs, or on a worker without "
        "any, as many processes as it has cores.",
    )
    max_job_gpus: int = Field(default=64, ge=1, description="Jobs that ask for more GPUs than this are refused.")
    max_job_gpu_memory_gb: float | None = Field(
        default=None, gt=0, description="Jobs that ask for more memory of each GPU are refused, GB. None: no limit."
    )
    worker_silent_s: float = Field(
        default=600.0, gt=0, description="A worker that is not heard of for this long is forgotten, seconds."
    )
    image_memory_bytes: int | None = Field(
        default=None,
        # The second is the name of 0.1; it goes with 0.3.
        validation_alias=AliasChoices("DEFEAT_IMAGE_MEMORY_BYTES", "DEFEAT_PICTURE_MEMORY_BYTES"),
        ge=0,
        description="Most memory in which a run keeps decoded images, bytes. None: 2 GiB or a quarter of what is "
        "free, whichever is less.",
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port on which /metrics is served, without a key. None: not at all."
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address on which /metrics is served. Nobody outside may reach it: it counts what all tenants do.",
    )
    log_level: str = Field(default="INFO", description="Least level that is logged.")

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
