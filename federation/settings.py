"""Every setting of every process: `FEDQUEUE_<FIELD>` in the environment, or `<field>` in a TOML file.

The environment wins over the file, which is `fedqueue.toml` in the working directory or what FEDQUEUE_CONFIG
names. Read once, where a process starts; inside, settings are passed as values. A wrong value stops the
process with the field's name (BadSettings). The defaults are the embedded mode: nothing to install.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from federation.base import describe
from federation.errors import BadSettings
from federation.hours import Hours
from federation.ids import Name
from federation.jobs import MAX_VERSION, ClassName
from federation.plugins import is_path

ENV_PREFIX = "FEDQUEUE_"
CONFIG_ENV = "FEDQUEUE_CONFIG"
CLI_ENV_PREFIX = "FEDQUEUE_CLI_"
"""Flags of single commands, which are no settings: cli/ reads them."""
DEFAULT_CONFIG = "fedqueue.toml"

AnnotationFormat = Literal["coco", "voc", "yolo", "street"]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """All settings, with their unit and range. `fedqueue settings` prints them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, validate_default=True
    )

    # where things are
    broker_url: SecretStr = Field(
        default=SecretStr("sqlite:.fedqueue/queue.db"),
        description="amqp://user:password@host:port/vhost, amqps://…, or sqlite:PATH (embedded)",
    )
    store_url: str = Field(
        default="file:.fedqueue/store",
        description="s3://host:port/bucket[?tls=true&region=us-east-1] or file:PATH (embedded)",
    )
    store_access_key: str = Field(default="", description="S3 access key")
    store_secret_key: SecretStr = Field(default=SecretStr(""), description="S3 secret key")
    live_url: SecretStr = Field(
        default=SecretStr("file:.fedqueue/live"),
        description="redis://[user:password@]host:port/db or file:PATH (embedded); holds site liveness",
    )

    # any process that makes a model
    plugins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="import paths package.module:attribute that a job may name as its architecture, with commas",
    )

    # a site
    site: Name | None = Field(default=None, description="this site's name; also its broker user")
    site_annotations: Path | None = Field(
        default=None, description="this site's annotations: a file or folder (docs/data.md)"
    )
    site_images: Path | None = Field(
        default=None, description="folder of this site's images; none: looked for beside the annotations"
    )
    site_format: AnnotationFormat | None = Field(
        default=None, description="of the annotations: coco, voc, yolo or street; none: recognised"
    )
    site_cache_bytes: int = Field(
        default=512 << 20, ge=0, le=1 << 40, description="bytes of decoded images that are kept in memory"
    )
    site_disk_cache_bytes: int = Field(
        default=0,
        ge=0,
        le=1 << 50,
        description="bytes of decoded images that are kept below site_state; 0: none",
    )
    site_eval_annotations: Path | None = Field(
        default=None, description="annotations of this site's validation images, which it never trains on"
    )
    site_eval_images: Path | None = Field(
        default=None,
        description="folder of the validation images; none: site_images, or beside their annotations",
    )
    site_eval_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of site_images, 0 to 1, to validate with instead; chosen by their content, never trained on",
    )
    site_classes: Annotated[tuple[ClassName, ...] | None, NoDecode] = Field(
        default=None,
        description="classes that this site's data have, with commas: a job with none of them is declined, and those "
        "that a job does not have are left out of its training; none: what its annotations hold",
    )
    site_all_classes: bool = Field(
        default=False, description="decline a job, too, of whose classes this site's data lack one"
    )
    site_max_model_bytes: int | None = Field(
        default=None, ge=1, description="bytes; jobs with a larger initial model are declined; none: no limit"
    )
    site_submitters: Annotated[tuple[Name, ...] | None, NoDecode] = Field(
        default=None,
        description='whose jobs are joined, with commas: sites, and "server" for operators; none: everybody\'s',
    )
    site_hours: str | None = Field(
        default=None,
        description="local hours in which trainings begin, such as 22:00-06:00; none: at any time",
    )
    site_max_load: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="load average per core, over a minute, above which no training begins; none: no limit",
    )
    site_state: Path = Field(default=Path(".fedqueue/site"), description="folder of outbox and model cache")
    site_duty: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of time, 0 to 1, that training may compute; the rest it sleeps",
    )
    trainer: str = Field(
        default="",
        description="what trains here instead of the built-in detector training: an entry point of group "
        "fedqueue.trainers, or package.module:attribute (docs/custom-models.md)",
    )
    site_nice: int = Field(
        default=10, ge=0, le=19, description="how far a site gives way to other programs, as of nice(1)"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$",
        description="where torch trains, measures and predicts: auto (CUDA if there is any), cpu, cuda or cuda:N",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of torch; 0: torch decides")
    predict_cache: Path = Field(
        default=Path(".fedqueue/predict"),
        description="folder of the models that `fedqueue predict` keeps, for use without the store",
    )
    poll_s: Seconds = Field(default=2.0, description="seconds between looks for a new version or an outcome")
    heartbeat_s: Seconds = Field(default=5.0, description="seconds between heartbeats of a site")
    heartbeat_ttl_s: Seconds = Field(
        default=15.0, description="seconds without one after which a site is gone"
    )
    backoff_limit_s: Seconds = Field(default=60.0, description="longest wait in seconds between retries")

    # the server
    max_update_bytes: int = Field(
        default=1 << 30, ge=1024, le=5 << 30, description="bytes; larger payloads are refused unread"
    )
    eval_annotations: Path | None = Field(
        default=None,
        description="held-out annotations of the evaluation worker: a file or folder (docs/data.md)",
    )
    eval_images: Path | None = Field(
        default=None, description="folder of the held-out images; none: looked for beside the annotations"
    )
    eval_format: AnnotationFormat | None = Field(
        default=None, description="of the held-out annotations, like site_format"
    )
    task_time_limit_s: int = Field(
        default=600, ge=10, le=1500, description="seconds; below the broker's 30-minute consumer timeout"
    )
    oversee_every_s: Seconds = Field(
        default=5.0,
        description="seconds between looks at all open jobs: invitations, deadlines, sites that have joined",
    )
    gc_every_s: Seconds = Field(
        default=3600.0,
        description="seconds between looks at all jobs, which remove what is needed no more (docs/operations.md)",
    )
    gc_grace_s: float = Field(
        default=7 * 86_400.0,
        ge=7200,
        le=3650 * 86_400,
        description="seconds that an object stays after it was last needed",
    )
    keep_versions: int = Field(
        default=20, ge=1, le=MAX_VERSION, description="newest model versions of a job that always stay"
    )
    delivery_limit: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="returns that a message survives; after one more, so after n + 1 deliveries, it is dead-lettered",
    )
    lease_s: Seconds = Field(
        default=30.0,
        description="seconds that the embedded queue leaves a message with a silent worker; a living one renews it",
    )

    @field_validator("broker_url", "store_url", "live_url")
    @classmethod
    def _scheme(cls, value: SecretStr | str, info: Any) -> SecretStr | str:
        allowed = {
            "broker_url": ("amqp", "amqps", "sqlite"),
            "store_url": ("s3", "file"),
            "live_url": ("redis", "rediss", "file"),
        }[info.field_name]
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        scheme, colon, rest = text.partition(":")
        if scheme not in allowed or not colon or not rest.strip("/"):
            raise ValueError(f"must begin with one of {', '.join(s + ':' for s in allowed)} and name a place")
        if scheme not in ("file", "sqlite"):
            _check_host(text)
        return value

    @field_validator("plugins", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        paths = (
            [path.strip() for path in value.split(",") if path.strip()] if isinstance(value, str) else value
        )
        for path in paths if isinstance(paths, list | tuple) else ():
            if not is_path(str(path)):
                raise ValueError(f"{path!r} is not an import path package.module:attribute")
        return paths

    @field_validator("site_classes", "site_submitters", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            raise ValueError("names with commas between them, without brackets and quotes: car, bus")
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @field_validator("site_hours")
    @classmethod
    def _hours(cls, value: str | None) -> str | None:
        return None if value is None else str(Hours.parse(value))

    @model_validator(mode="after")
    def _liveness(self) -> Self:
        if self.heartbeat_ttl_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"heartbeat_ttl_s is {self.heartbeat_ttl_s:g}, must be at least twice heartbeat_s "
                f"({self.heartbeat_s:g}): one lost heartbeat is no dead site"
            )
        return self

    @model_validator(mode="after")
    def _validation(self) -> Self:
        if self.site_eval_annotations is None and self.site_eval_images is not None:
            raise ValueError("site_eval_images needs site_eval_annotations")
        if self.site_eval_annotations is not None and self.site_eval_fraction:
            raise ValueError("set site_eval_annotations or site_eval_fraction, not both")
        return self

    @property
    def embedded(self) -> bool:
        """True if the broker is the embedded queue, so that one process is the whole server."""
        return self.broker_url.get_secret_value().startswith("sqlite:")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = os.environ.get(CONFIG_ENV, DEFAULT_CONFIG)
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read environment and file; `overrides` (command-line flags) win. Raises BadSettings."""
        named = os.environ.get(CONFIG_ENV)
        if named and not Path(named).is_file():
            raise BadSettings(f"{CONFIG_ENV} names {named}, which is not a file")
        unknown = [
            name
            for name in os.environ
            if name.startswith(ENV_PREFIX)
            and name != CONFIG_ENV
            and not name.startswith(CLI_ENV_PREFIX)
            and name.removeprefix(ENV_PREFIX).lower() not in cls.model_fields
        ]
        if unknown:
            raise BadSettings(f"unknown settings in the environment: {', '.join(sorted(unknown))}")
        try:
            return cls(**{k: v for k, v in overrides.items() if v is not None})
        except ValidationError as exc:
            raise BadSettings(f"settings: {describe(exc)} (environment names: {ENV_PREFIX}<FIELD>)") from exc
        except ValueError as exc:  # a TOML file that is no TOML
            raise BadSettings(f"settings file: {exc}") from exc


def _check_host(url: str) -> None:
    """Raises ValueError, without a part of the URL in it: it may hold a password."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        # most often the cause is a password with "/" in it, which ends the host early
        raise ValueError(
            "host or port cannot be read; in a password write / # ? @ as %2F %23 %3F %40"
        ) from None
    if not host:
        raise ValueError("has no host")


def env_name(field: str) -> str:
    """The environment variable of a settings field."""
    return ENV_PREFIX + field.upper()
