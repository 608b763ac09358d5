"""Options of a restoration: from the command line, then from a TOML file, then the defaults."""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jobs.errors import UsageError
from models import parse_tile
from pipeline.prompting import parse_label


class RestoreOptions(BaseModel):
    """What `dfpir restore` can be told; the names are those of its options and of the TOML file's keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "dfpir-compact"
    classifier: str = "degradation-small"
    label: str = "auto"
    reference: Path | None = None
    format: Literal["same", "png", "jpeg", "webp"] = "same"
    quality: int = Field(95, ge=1, le=100)
    clean: Literal["copy", "link", "skip"] = "copy"
    engine: Literal["ray", "local"] = "ray"
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_workers: int | None = Field(None, ge=1)
    tile: str = "auto"
    min_confidence: float | None = Field(None, ge=0, le=1)
    second_look: bool = True
    max_failed_fraction: float = Field(0.05, ge=0, le=1)
    limit: int | None = Field(None, ge=1)
    retry_failed: bool = False
    max_pixels: int = Field(400_000_000, ge=1)

    @field_validator("label")
    @classmethod
    def _known_label(cls, value: str) -> str:
        parse_label(value)
        return value

    @field_validator("tile", mode="before")
    @classmethod
    def _tile_size(cls, value: object) -> str:
        return str(parse_tile(str(value)))


def read_options(config_file: Path | None, given: dict[str, Any]) -> RestoreOptions:
    """Merges the options given on the command line (None: not given) over those of a TOML file.

    Raises `UsageError` naming each wrong option, the file if it stands there, what it was and what it may be.
    """
    from_file: dict[str, Any] = {}
    if config_file is not None:
        try:
            from_file = tomllib.loads(config_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the configuration file {config_file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{config_file} is not valid TOML: {error}") from error
        from_file = {key.replace("-", "_"): value for key, value in from_file.items()}
    told = {key: value for key, value in given.items() if value is not None}
    try:
        return RestoreOptions(**(from_file | told))
    except ValidationError as error:
        lines = [
            _explain(fault) if fault["loc"][0] in told else f"{config_file}: {_explain(fault)}"
            for fault in error.errors()
        ]
        raise UsageError("\n".join(lines)) from error


def _explain(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(field.replace("_", "-") for field in RestoreOptions.model_fields)
        return f"unknown option {name!r}; known are {known}"
    return f"--{name} {fault['input']}: {fault['msg'].removeprefix('Value error, ')}"
