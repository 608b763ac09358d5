"""Options that commands have in common."""

from pathlib import Path
from typing import Annotated, Any

import typer


def named(text: str) -> Path:
    """A path that says something: an empty one would be the working directory."""
    if not text:
        raise typer.BadParameter("it is empty (a shell variable that is not set?); the working directory is `.`")
    return Path(text)


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        parser=named,
        help="Folder of photographs, searched recursively, or a list of them: .txt with a path per line, .csv or "
        ".parquet with a column `path`; relative paths start at the list's folder. Never changed.",
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="OUT", parser=named, help="Run folder: images, manifest, plan and logs go here.")
]
Model = Annotated[
    str | None, typer.Option(help="Restoration weights: a name from `dfpir models`, or a file; default: dfpir-compact.")
]
ClassifierName = Annotated[
    str | None,
    typer.Option("--classifier", help="Classifier weights: a name, a file, or clip:FILE; default: degradation-small."),
]
Label = Annotated[
    str | None,
    typer.Option(
        help="auto, or the one damage of all images: noise[:SIGMA], rain, haze, blur, lowlight; default: auto."
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", parser=named, help="Folder of undamaged originals, matched by relative path without extension."
    ),
]
Format = Annotated[str | None, typer.Option(help="Format of restored images: same, png, jpeg or webp; default: same.")]
Quality = Annotated[int | None, typer.Option(help="JPEG and WebP quality, 1 to 100; default: 95.")]
Clean = Annotated[
    str | None, typer.Option(help="Images that are not restored: copy, link (hard links) or skip; default: copy.")
]
Engine = Annotated[str | None, typer.Option(help="ray or local (no Ray at all); default: ray.")]
Address = Annotated[
    str | None,
    typer.Option(help="Address of a running Ray cluster; default: RAY_ADDRESS, else one is started here."),
]
Device = Annotated[str | None, typer.Option(help="Where networks run: auto, cpu or cuda; default: auto.")]
Dtype = Annotated[str | None, typer.Option(help="Precision: auto, float32 or bfloat16; default: auto.")]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        help="At most this many workers; default: on Ray what there is room for, else up to eight per GPU, or one."
    ),
]
Tile = Annotated[
    str | None, typer.Option(help="Restore in tiles: auto, off, or the side of a tile in pixels; default: auto.")
]
MinConfidence = Annotated[
    float | None, typer.Option(help="Abstain below this probability, 0 to 1; default: the classifier's thresholds.")
]
SecondLook = Annotated[
    bool | None,
    typer.Option(
        "--second-look/--no-second-look",
        help="Classify each result again, to fill `clean_probability_after`; default: yes.",
    ),
]
MaxFailedFraction = Annotated[
    float | None,
    typer.Option(help="A larger share of failures makes the exit code 1; the run never stops for it; default: 0.05."),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Plan no more than the first N images of SRC; what an earlier call planned is done as well."),
]
RetryFailed = Annotated[
    bool | None, typer.Option("--retry-failed", help="Try images again that failed or were quarantined.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        parser=named,
        help="TOML file with options of `restore`, and max-pixels; the command line wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def given_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a command without its positional and its own arguments."""
    return {k: v for k, v in arguments.items() if k not in {"src", "out", "image", "picture", "config", "as_json"}}
