"""Training configurations: TOML files, read strictly into dataclasses with the standard library alone."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from classifier.architecture import Architecture
from classifier.calibration import FEWEST_SAMPLES
from classifier.labels import Degradation
from jobs.datasets import PARTNERS
from jobs.errors import UsageError
from models.dfpir import DFPIRConfig

Kind = TypeVar("Kind")


class ConfigError(UsageError):
    """A configuration that cannot be used; the message names the file and the key."""


RULES: dict[str, Callable[[float], bool]] = {
    "from 0 to 1": lambda number: 0 <= number <= 1,
    "from 0 to below 1": lambda number: 0 <= number < 1,
    "from 0 up": lambda number: 0 <= number < math.inf,
    "above 0": lambda number: 0 < number < math.inf,
    "above 0, up to 1": lambda number: 0 < number <= 1,
    "a whole number from 0 to below 2**63": lambda number: 0 <= number < 2**63,
}


def _check(config: object, rule: str, *names: str) -> None:
    """Raises ValueError naming the first of these fields, numbers or collections of them, that breaks a rule."""
    for name in names:
        value = getattr(config, name)
        numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else [value]
        for number in numbers:
            if not RULES[rule](number):
                raise ValueError(f"{name} is {rule}, not {number}")


@dataclass(frozen=True)
class Pairs:
    """A folder of degraded photographs and one of their references, for one label."""

    label: Degradation
    degraded: Path
    reference: Path
    match: str = "name"
    """How files find their reference: by `name` without extension, by the `number` in it, or by what stands
    `before_underscore`."""

    def __post_init__(self) -> None:
        if self.match not in PARTNERS:
            raise ValueError(f"match is one of {', '.join(PARTNERS)}")


@dataclass(frozen=True)
class Data:
    """What is trained on; relative paths start at the working directory."""

    clean: tuple[Path, ...] = ()
    """Folders of clean photographs, which are degraded by synthesis."""
    pairs: tuple[Pairs, ...] = ()
    labelled: Mapping[Degradation, tuple[Path, ...]] = field(default_factory=dict)
    """For a classifier, by label: folders of images that carry it as they are and are never degraded by synthesis."""
    least_readable: float = 0.9
    """Training stops before it begins where a smaller share of the files can be read."""
    pair_share: float = 0.5
    """Of the samples of a label that has pairs, this share are pairs and the rest synthesised."""
    smallest_scale: Mapping[Degradation, float] = field(default_factory=dict)
    """Clean photographs are shrunk by down to this; half if a label is not named. Pairs never are."""
    noise_sigmas_255: tuple[float, ...] = ()
    """Noise is white, of one of these standard deviations on the 0..255 scale; none named: as `draw_recipe` has it."""
    on_disk: bool = False
    """Photographs are read for every patch, since they do not fit into memory."""

    def __post_init__(self) -> None:
        _check(self, "from 0 to 1", "least_readable", "pair_share")
        _check(self, "above 0, up to 1", "smallest_scale")
        _check(self, "from 0 up", "noise_sigmas_255")
        labels = [pairs.label for pairs in self.pairs]
        if len(set(labels)) < len(labels):
            raise ValueError("there may be one folder of pairs for each label")
        if not self.clean and not self.pairs:
            raise ValueError("names neither clean photographs nor pairs")


@dataclass(frozen=True)
class Phase:
    """A stretch of training from `start`, a share of the whole: shares of the tasks, patch and batch size."""

    start: float
    patch_px: int
    batch: int
    tasks: Mapping[Degradation, float]
    blur_paths: int = 0
    """Blur comes along so many different paths, the first of those that a later phase has more of; 0: along any."""

    def __post_init__(self) -> None:
        _check(self, "from 0 to below 1", "start")
        _check(self, "from 0 up", "blur_paths", "tasks")
        if self.patch_px < 16 or self.batch < 1:
            raise ValueError("patch_px is at least 16, batch at least 1")
        if not sum(self.tasks.values()):
            raise ValueError("tasks needs a positive share")
        if Degradation.CLEAN in self.tasks or Degradation.OTHER in self.tasks:
            raise ValueError("there is no prompt for clean or other")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What trainings have in common."""

    data: Data
    steps: int = 0
    """The training ends after so many steps; 0: after `minutes`, by which learning rate and phases then go as well."""
    minutes: float = 0.0
    seed: int = 0
    start_from: Path | None = None
    """A checkpoint (`.pt`) whose averaged weights are taken up, or a model's name or weights file.

    The optimiser is new.
    """
    learning_rate: float = 2e-4
    """The peak, after a warm-up, from which it falls as a cosine."""
    warm_up: float = 0.02
    """Share of the training."""
    weight_decay: float = 1e-4
    average_decay: float = 0.999
    """Of the moving average of the weights, which is what is validated and exported."""

    def __post_init__(self) -> None:
        _check(self, "from 0 up", "steps", "minutes", "weight_decay")
        _check(self, "a whole number from 0 to below 2**63", "seed")
        _check(self, "above 0", "learning_rate")
        _check(self, "from 0 to below 1", "warm_up", "average_decay")
        if (self.steps > 0) == (self.minutes > 0):
            raise ValueError("one of steps and minutes says how long to train")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is over, 0..1."""
        return min(step / self.steps if self.steps else seconds / 60 / self.minutes, 1.0)

    def learning_rate_at(self, progress: float) -> float:
        """Linear warm-up from a hundredth of the peak, then a cosine back to that."""
        if progress < self.warm_up:
            share = progress / self.warm_up
        else:
            share = 0.5 * (1 + math.cos(math.pi * (min(progress, 1.0) - self.warm_up) / (1 - self.warm_up)))
        return self.learning_rate * (0.01 + 0.99 * share)

    def average_decay_at(self, step: int) -> float:
        """Of the moving average after so many steps: it forgets the random start quickly at first."""
        return min(self.average_decay, step / (step + 20))


@dataclass(frozen=True, kw_only=True)
class RestorerTraining(TrainingConfig):
    """All that decides what a training of the restorer gives."""

    phases: tuple[Phase, ...]
    model: DFPIRConfig = field(default_factory=DFPIRConfig)
    prompts: str = "orthogonal"
    """`orthogonal`: a fixed table; `clip:PATH`: the sentences' embeddings by a CLIP checkpoint; or a model's name or
    weights file, whose bank is used."""
    initialisation: str = "published"
    """`published`, or `identity`: `jobs.train_restorer.initialise`, for trainings of hours rather than days."""
    loss: str = "l1"
    """`l1` as published, or `relative`: the logarithm of each image's L1."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.0
    """The gradient's norm is cut to this; 0: never."""
    jpeg_share: float = 0.0
    """Share of the synthesised patches that go through JPEG of quality 70 to 95, as files come."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.labelled:
            raise ValueError("data.labelled is for a classifier; a restorer learns from clean photographs and pairs")
        _check(self, "from 0 to below 1", "betas")
        _check(self, "from 0 up", "clip_norm")
        _check(self, "from 0 to 1", "jpeg_share")
        dim, blocks = self.model.dim, self.model.num_refinement_blocks
        if blocks < 0 or not 1 <= dim * self.model.ffn_expansion_factor < math.inf:
            raise ValueError("model needs a dim x ffn_expansion_factor of at least 1, and no negative blocks")
        if not self.phases or self.phases[0].start != 0:
            raise ValueError("the first of phases starts at 0")
        if [p.start for p in self.phases] != sorted(p.start for p in self.phases):
            raise ValueError("phases come in the order of their start")
        if self.initialisation not in ("published", "identity") or self.loss not in ("l1", "relative"):
            raise ValueError("initialisation is published or identity, loss is l1 or relative")
        paths = any(phase.blur_paths for phase in self.phases)
        if not self.data.clean and (self.jpeg_share or self.data.noise_sigmas_255 or self.data.smallest_scale or paths):
            raise ValueError(
                "jpeg_share, blur_paths, noise_sigmas_255 and smallest_scale are of what is made of clean photographs, "
                "and data.clean names none"
            )
        paired = {pairs.label for pairs in self.data.pairs}
        for phase in self.phases:
            if not self.data.clean and (without := set(phase.tasks) - paired):
                raise ValueError(f"there are neither clean photographs nor pairs for {', '.join(sorted(without))}")
            if phase.patch_px % self.model.size_multiple:
                raise ValueError(f"patch_px must be a multiple of {self.model.size_multiple}, not {phase.patch_px}")

    def phase_at(self, progress: float) -> Phase:
        """The phase that `progress` lies in."""
        return [phase for phase in self.phases if phase.start <= progress][-1]


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining(TrainingConfig):
    """All that decides what a training of the classifier gives; its photographs are clean ones."""

    network: Architecture = field(default_factory=Architecture)
    """The shape, that of the shipped classifier if not given."""
    batch: int = 48
    pool: int = 16_000
    """Samples kept, in a file of some 140 kB each: synthesis costs more than a training step."""
    first_fill: int = 1500
    """Samples made before the first step."""
    fresh: int = 8
    """Samples renewed every step."""
    validation_samples: int = 1600
    teacher: Path | None = None
    """A classifier's name or weights file, whose predictions are learnt beside the labels: `jobs.train_classifier`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch, self.pool, self.first_fill) < 1 or self.fresh < 0:
            raise ValueError("batch, pool and first_fill are at least 1, fresh at least 0")
        if self.validation_samples < FEWEST_SAMPLES:  # an export calibrates on them
            raise ValueError(f"validation_samples are at least {FEWEST_SAMPLES}, not {self.validation_samples}")
        if not self.data.clean:
            raise ValueError("data.clean names no photographs")
        if self.data.pairs or self.data.on_disk or self.data.smallest_scale or self.data.noise_sigmas_255:
            raise ValueError("a classifier's data is clean photographs in memory, without pairs, scales or sigmas")


def as_plain(value: Any) -> Any:
    """A configuration as nested dicts, lists, strings and numbers, to be stored and compared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return str(value) if isinstance(value, Path | StrEnum) else value


def from_plain(kind: type[Kind], plain: dict[str, Any]) -> Kind:
    """The inverse of `as_plain`; fields that are not there have their defaults. Raises ValueError as `read_config`."""
    return typing.cast(Kind, _convert(kind, plain, ""))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line for each field in which two plain configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        both = enumerate(zip(old, new, strict=True))
        return [line for place, (one, other) in both for line in differences(one, other, f"{where}[{place}]")]
    return [] if old == new else [f"{where}: was {old!r}, is now {new!r}"]


def read_config(kind: type[Kind], path: Path) -> Kind:
    """Reads a TOML file as a configuration of this kind; a key `extends` names a file beside it that is read before.

    Raises:
        ConfigError: the file cannot be read, names an unknown key, lacks one, or gives a value that cannot be.
    """
    try:
        return from_plain(kind, _read_table(path))
    except OSError as error:
        extended = f", which {path} extends" if Path(error.filename or path) != path else ""
        raise ConfigError(f"cannot read {error.filename or path}{extended}: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_table(path: Path, *extending: Path) -> dict[str, Any]:
    """What a file says and what it extends; `extending` are the files that extend it."""
    if path.resolve() in extending:
        raise ValueError(f"extends itself, by way of {', '.join(each.name for each in extending)}")
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    base = table.pop("extends", None)
    if base is not None:
        _checked(str, base, "extends")
    return _merged(_read_table(path.parent / base, *extending, path.resolve()), table) if base is not None else table


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key; anything else is replaced."""
    both = old.keys() & new.keys()
    nested = {k: _merged(old[k], new[k]) for k in both if isinstance(old[k], dict) and isinstance(new[k], dict)}
    return old | new | nested


def _convert(kind: Any, value: Any, where: str) -> Any:
    """A value of TOML as what a field is annotated with."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # `X | None`: None is what a file does not name
        return None if value is None else _convert(inner[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _convert_table(kind, _checked(dict, value, where), where)
    if origin is tuple:
        items = _checked(list, value, where)
        kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(items):
            raise ValueError(f"{where} needs {len(kinds)} entries, not {len(items)}")
        return tuple(
            _convert(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is Mapping:
        table = _checked(dict, value, where)
        return {
            _convert(inner[0], key, where): _convert(inner[1], item, f"{where}.{key}") for key, item in table.items()
        }
    if kind is float:
        return float(_checked(int | float, value, where))
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise ValueError(f"{where}: {value!r} is none of {', '.join(kind)}")
        return kind(value)
    if kind is Path:
        return kind(_checked(str, value, where))
    return _checked(kind, value, where)


def _convert_table(kind: Any, table: dict[str, Any], where: str) -> Any:
    fields, prefix = dataclasses.fields(kind), f"{where}." if where else ""
    if unknown := sorted(table.keys() - {f.name for f in fields}):
        known = ", ".join(f.name for f in fields)
        raise ValueError(f"unknown key {prefix}{unknown[0]}; known are {known}")
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in table:
            raise ValueError(f"{prefix}{f.name} is missing")
    hints = typing.get_type_hints(kind)
    values = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _checked(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} cannot be {value!r}")
    return value
