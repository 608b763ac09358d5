"""What is done to one image besides restoring it: read it, find its reference, judge the result, write it.

Each function leaves a fault as the item's `failed` row and never raises for it; several threads call them.
"""

import hashlib
import os
from collections.abc import Collection, Sequence

from pipeline.faults import fault_point
from pipeline.images import ImageFault, decode, encode, encoded_format, to_uint8
from pipeline.item import Item, SourceGoneError
from pipeline.metadata import lies
from pipeline.metrics import change_rmse_255, clipped_fraction, psnr_db, ssim
from pipeline.outputs import ReferenceIndex, restored_name
from pipeline.records import ImageRef, Stage
from pipeline.run_config import RunConfig
from pipeline.sink import RunDirectory, Written
from pipeline.source import fetch, is_gone, local_path
from pipeline.transparency import completed

SUSPICIOUS_CLIPPED = 0.2
"""A result is suspicious if black and white samples make up that much more of it than of its input."""

SUSPICIOUS_CHANGE_255 = 100.0
"""A result is suspicious if it moved by more than this root mean square, on the 0..255 scale."""


def load(
    item: Item, config: RunConfig, *, source_root: str, shard: Sequence[ImageRef], directory: RunDirectory
) -> None:
    """Fetches and decodes. Raises SourceGoneError when no image of the source, or of a part, is there any more."""
    with item.stage(Stage.FETCH):
        if directory.holds(local_path(item.ref.uri)):
            # A new revision of it would be written over what it was read from.
            raise ImageFault(
                Stage.FETCH, "own_result", "a link to a result of this run; put the photograph in its place"
            )
        item.data = fetch(item.ref)
        item.facts.update(source_bytes=len(item.data), source_sha256=hashlib.sha256(item.data).hexdigest())
        if len(item.data) != item.ref.size_bytes:
            item.warnings.append(
                f"the file changed after it was planned: {item.ref.size_bytes:,} bytes then, {len(item.data):,} now"
            )
    if item.has_failed:
        if is_gone(source_root, item.ref, shard):
            raise SourceGoneError(
                f"the source {source_root} cannot be reached any more, or is empty; or so is the folder of "
                f"{item.ref.relative_path} in it"
            )
        return
    with item.stage(Stage.DECODE):
        fault_point("decode", item.ref.relative_path)
        image = decode(item.data, max_pixels=config.max_pixels)
        item.image = image
        item.warnings.extend(image.warnings)
        item.facts.update(
            source_format=image.source_format, width=image.width, height=image.height, mode=image.mode,
            bit_depth=image.bit_depth, has_alpha=image.alpha is not None, exif_orientation=image.exif_orientation,
        )  # fmt: skip


def measure_input(item: Item, references: ReferenceIndex | None, config: RunConfig) -> None:
    """Holds the input against its reference, if there is one of the same size."""
    if references is None or item.has_failed:
        return
    with item.stage(Stage.MEASURE):
        try:
            match = references.find(item.ref.relative_path)
        except OSError as error:
            item.warnings.append(f"not measured: references cannot be listed ({error.strerror})")
            return
        if match is None:
            return
        if match.others:
            names = ", ".join(path.name for path in match.others)
            item.warnings.append(f"several references match: {match.path.name} was taken, not {names}")
        seen = item.seen()
        try:
            reference = to_uint8(decode(match.path.read_bytes(), max_pixels=config.max_pixels).visible)
        except Exception as error:
            # A broken reference takes the figures away, not the image.
            item.warnings.append(f"not measured: the reference cannot be read ({error})")
            return
        if reference.shape != seen.shape:
            theirs, ours = (f"{shape[1]} x {shape[0]}" for shape in (reference.shape, seen.shape))
            item.warnings.append(f"not measured: the reference is {theirs} pixels, the image {ours}")
            return
        alpha = item.decoded().alpha
        if alpha is not None:
            reference = completed(reference, alpha)  # like the picture that it is held against
        item.reference = reference
        item.facts.update(
            reference_uri=match.path.as_uri(), psnr_input_db=psnr_db(seen, reference), ssim_input=ssim(seen, reference)
        )


def measure_result(item: Item) -> None:
    """Holds the result against the reference and against the input; one left alone scores as its input."""
    if item.has_failed:
        return
    with item.stage(Stage.MEASURE):
        if item.restored is None:
            if item.reference is not None:
                item.facts.update(psnr_db=item.facts["psnr_input_db"], ssim=item.facts["ssim_input"])
            return
        result, seen = item.result_seen(), item.seen()
        if item.reference is not None:
            item.facts.update(psnr_db=psnr_db(result, item.reference), ssim=ssim(result, item.reference))
        change, clipped = change_rmse_255(seen, result), clipped_fraction(result)
        item.facts.update(
            change_rmse_255=change,
            clipped_fraction=clipped,
            suspicious=change > SUSPICIOUS_CHANGE_255 or clipped - clipped_fraction(seen) > SUSPICIOUS_CLIPPED,
        )


def write(item: Item, directory: RunDirectory, config: RunConfig, *, reserved: Collection[str]) -> None:
    """Encodes a restored image, or takes the input's bytes, and gives the output its name.

    `reserved` are relative paths of other images, besides those that are in the source now.
    """
    if item.has_failed:
        return
    if item.restored is None:
        _keep(item, directory, config)
        return
    with item.stage(Stage.ENCODE):
        encoded = encode(item.decoded(), item.restored, format=config.output_format, quality=config.quality)
        item.warnings.extend(encoded.warnings)
        source, relative_path = local_path(item.ref.uri), item.ref.relative_path

        def taken(path: str) -> bool:
            return path in reserved or os.path.exists(f"{source}{path.removeprefix(relative_path)}")

        name = restored_name(
            relative_path,
            source_format=item.decoded().source_format,
            output_format=encoded_format(item.decoded().source_format, config.output_format),
            option=config.output_format,
            taken=taken,
        )
    if item.has_failed:
        return
    with item.stage(Stage.WRITE):
        written = directory.write_image(name, encoded.data)
        _note_output(item, directory, written)
        item.facts.update(
            output_format=encoded.format,
            output_mode=encoded.mode,
            output_width=encoded.width,
            output_height=encoded.height,
        )


def _keep(item: Item, directory: RunDirectory, config: RunConfig) -> None:
    """An image that stays as it was: its bytes under its name, linked, or nothing, as `--clean` says."""
    if config.clean == "skip":
        return
    with item.stage(Stage.WRITE):
        path = item.ref.relative_path
        if config.clean == "link":
            written = directory.link_image(path, local_path(item.ref.uri), item.data)
        else:
            written = directory.write_image(path, item.data)
        _note_output(item, directory, written)
        image = item.decoded()
        size = (image.height, image.width) if lies(image.exif_orientation) else (image.width, image.height)
        item.facts.update(
            output_format=image.source_format,
            output_mode=image.mode,
            output_width=size[0],
            output_height=size[1],
        )


def _note_output(item: Item, directory: RunDirectory, written: Written) -> None:
    item.facts.update(
        output_uri=directory.uri(written.path), output_sha256=written.sha256, output_bytes=written.size_bytes
    )
