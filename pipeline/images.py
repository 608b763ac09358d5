"""Image files to pixels and back: the one module that the rest of the project imports for it."""

from pipeline.decoding import decode, read_header
from pipeline.encoding import encode, encoded_format, over_white
from pipeline.image_records import DecodedImage, EncodedImage, Header, ImageFault, Pixels, as_grey_as, to_uint8

__all__ = [
    "DecodedImage",
    "EncodedImage",
    "Header",
    "ImageFault",
    "Pixels",
    "as_grey_as",
    "decode",
    "encode",
    "encoded_format",
    "over_white",
    "read_header",
    "to_uint8",
]
