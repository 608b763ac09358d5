"""What would become of one photograph."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.config import RestoreOptions
from jobs.display import tell_if_uncalibrated
from jobs.errors import UsageError
from jobs.networks import load_networks
from jobs.places import require_writable
from jobs.sheets import Pixels, side_by_side
from jobs.text import harmless
from pipeline.images import ImageFault, as_grey_as, decode, over_white, to_uint8
from pipeline.metrics import is_flat
from pipeline.prompting import decide, decide_forced, parse_label
from pipeline.records import Status
from pipeline.source import IMAGE_EXTENSIONS

DEFAULT_ENDING = ".preview.png"
CELL_PX = 800
MIDDLE_PX = 400


def preview(image: Path, picture: Path, options: RestoreOptions, *, console: Console) -> None:
    """Prints probabilities and the decision in words, and writes a before/after picture.

    Raises `UsageError` if the image cannot be read, weights are at fault, or the picture would overwrite another one,
    and OSError if the picture cannot be written.
    """
    if os.path.realpath(picture) == os.path.realpath(image):
        raise UsageError(f"--picture {picture} is the image itself; choose another name")
    if picture.suffix.lower() not in IMAGE_EXTENSIONS:
        raise UsageError(f"--picture {picture}: give a name that ends in {', '.join(sorted(IMAGE_EXTENSIONS))}")
    if picture.exists() and not picture.name.endswith(DEFAULT_ENDING):
        raise UsageError(f"--picture {picture} is there already; choose another name")
    try:
        decoded = decode(image.read_bytes(), max_pixels=options.max_pixels)
    except OSError as error:
        raise UsageError(f"cannot read {image}: {error.strerror}") from error
    except ImageFault as fault:
        raise UsageError(f"{image}: {fault}") from fault
    require_writable(picture)
    restorer, classifier = load_networks(options)
    shown = to_uint8(decoded.visible)
    prediction = classifier.predict([shown])[0]
    label, sigma = parse_label(options.label)
    if label == "auto":
        decision = decide(
            prediction,
            prompts=restorer.prompts.keys,
            min_confidence=options.min_confidence,
            is_flat=is_flat(decoded.visible),
        )
    else:
        decision = decide_forced(
            label, sigma_255=sigma, estimated_sigma_255=prediction.noise_sigma_255, prompts=restorer.prompts.keys
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, probability in sorted(prediction.probabilities.items(), key=lambda item: -item[1]):
        table.add_row(str(name), f"{probability:6.1%}", "#" * round(40 * probability))
    console.print(table)
    for warning in (*decoded.warnings, *(decoded.lost if decision.prompt else ())):
        console.print(f"note: {warning}", markup=False, soft_wrap=True)
    tell_if_uncalibrated(console, options.classifier)
    console.print(f"estimated noise: sigma {prediction.noise_sigma_255:.1f} of 255")
    console.print(f"{decision.status}: {decision.reason}", markup=False, soft_wrap=True)
    cells = [("before", shown)]
    if decision.status is Status.RESTORED and decision.prompt is not None:
        after = as_grey_as(shown, restorer.restore([shown], [decision.prompt])[0])
        cells.append((f"after, prompt {decision.prompt}", after))
    else:
        cells.append((f"kept as it is: {decision.status}", shown))
    if decoded.alpha is not None:
        alpha = to_uint8(decoded.alpha)
        cells = [(caption, over_white(pixels, alpha)) for caption, pixels in cells]
    # Numbers mean what they do in the photograph; the sheet is in colour, which a profile for greyscale is not for.
    profile = None if decoded.icc is None or decoded.icc[16:20] == b"GRAY" else decoded.icc
    rows = [cells]
    if max(shown.shape[:2]) > CELL_PX:  # shrunk, in which noise and blur go
        rows.append([("its middle at full size", _middle(pixels)) for _, pixels in cells])
    side_by_side(rows, cell_px=CELL_PX).save(picture, icc_profile=profile)
    console.print(f"picture: {harmless(str(picture))}", markup=False, soft_wrap=True)


def _middle(pixels: Pixels) -> Pixels:
    """The middle of a picture, at most `MIDDLE_PX` a side."""
    top, left = (max(0, side - MIDDLE_PX) // 2 for side in pixels.shape[:2])
    return pixels[top : top + MIDDLE_PX, left : left + MIDDLE_PX]
