"""Options of a restoration: from the command line, then from a TOML file, then the defaults."""

import json
import tomllib
from collections import Counter
from collections.abc import Callable
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
    quality: int = Field(default=95, ge=1, le=100)
    clean: Literal["copy", "link", "skip"] = "copy"
    engine: Literal["ray", "local"] = "ray"
    address: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_workers: int | None = Field(default=None, ge=1)
    tile: str = "auto"
    min_confidence: float | None = Field(default=None, ge=0, le=1)
    second_look: bool = True
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    retry_failed: bool = False
    max_pixels: int = Field(default=400_000_000, ge=1)

    @field_validator("reference", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "":
            raise ValueError("it is empty; the working directory is `.`")
        return value

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
    names = Counter(key.replace("-", "_") for key in from_file)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"{config_file}: {twice[0].replace('_', '-')} is there twice, also with _ for -; take one out")
    told = {key: value for key, value in given.items() if value is not None}
    left = {name: value for key, value in from_file.items() if (name := key.replace("-", "_")) not in told}
    try:
        # By way of JSON, as which a path is text: what is a number or yes and no has to be one in the file.
        chosen = RestoreOptions.model_validate_json(json.dumps(left, default=str), strict=True)
    except ValidationError as error:
        raise UsageError(
            "\n".join(f"{config_file}: {_explain(fault, json.dumps)}" for fault in error.errors())
        ) from error
    try:
        options = RestoreOptions(**(chosen.model_dump(exclude_unset=True) | told))
    except ValidationError as error:
        raise UsageError("\n".join(_explain(fault, str) for fault in error.errors())) from error
    if options.engine == "local" and options.address is not None:
        raise UsageError(f"--address {options.address}: --engine local uses no cluster; leave one of them out")
    return options


def _explain(fault: Any, written: Callable[[Any], str]) -> str:
    name = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
    if fault["type"] == "extra_forbidden":
        known = ", ".join(field.replace("_", "-") for field in RestoreOptions.model_fields)
        return f"unknown option {name!r}; known are {known}"
    return f"--{name} {written(fault['input'])}: {fault['msg'].removeprefix('Value error, ')}"
