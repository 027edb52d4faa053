"""Reads image files as 8-bit RGB, from the modes that Pillow knows."""

from __future__ import annotations

import os
import warnings
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from vmoe_routers.training.error import DataError

# Pillow recognises formats by content, not by file name. EPS is left out, because its decoder starts a program.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "bmp", "tif", "tiff", "gif")
"""Endings of the names of image files in folders and shards, in lower case."""
_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_OPAQUE = ("1", "L", "P", "RGB", "CMYK", "YCbCr")
_MOST_LONG = 100  # largest ratio of the sides: resizing a longer strip would need far more memory than reading it
_BITS_PER_SAMPLE, _PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1  # two tags of TIFF, and a value of the second tag


def read_picture(path: str) -> Image.Image:
    """Reads an image file as an RGB image of 8 bits, rotated as its EXIF orientation says.

    Grey levels of 16 bits are scaled to 8 bits. Transparent pixels get a white background. CMYK is converted without a
    colour profile.

    Raises:
        DataError: The file is not a regular file (a pipe, a device, a broken link), is not an image, is damaged, is
            larger than Pillow allows, is an animation or a document, has sides of more than 100 to 1, or has pixels of
            unknown range (32-bit integers and floats). The message names the file.
    """
    if not os.path.isfile(path):  # a pipe would block
        raise DataError(f"{path}: not a regular file")
    try:
        # Given a path, Pillow 13 maps uncompressed TIFF files into memory, and reads rotated TIFF files wrongly.
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    with file:
        return decode_picture(file, path)


def decode_picture(file: BinaryIO, name: str) -> Image.Image:
    """Reads an image from an open file or from bytes in memory, as `read_picture` does.

    Raises:
        DataError: The image cannot be read. The message begins with `name`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings do not name the file
            with Image.open(file, formats=_FORMATS) as image:
                _refuse_shape(name, image)
                _refuse_pixels(name, image)
                image.load()  # already rotates a TIFF file
                return _as_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError:  # Pillow's message has the file object, not the name
        raise DataError(f"{name}: cannot be read: cannot identify image file") from None
    except Exception as error:  # damaged files make Pillow's decoders raise errors of nearly every type
        reason = "not enough memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
        raise DataError(f"{name}: cannot be read: {reason}") from error


def _refuse_shape(path: str, image: Image.Image) -> None:
    if max(image.size) > _MOST_LONG * min(image.size):
        sides = " x ".join(map(str, image.size))
        raise DataError(f"{path}: {sides} pixels, wanted sides of at most {_MOST_LONG} to 1")
    # A JPEG file of several pictures (MPO) is a photograph, followed by previews or a second view.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise DataError(f"{path}: an animation or a document of {frames} frames, wanted one picture")


def _refuse_pixels(path: str, image: Image.Image) -> None:
    if _is_deep(image):
        if "transparency" in image.info:
            raise DataError(f"{path}: 16-bit grey with a transparent level, wanted it opaque or in 8 bits")
        if not _is_16_bit(image):
            raise DataError(f"{path}: pixels of Pillow's mode {image.mode}, wanted 8 bits, or 16 with black at 0")
    elif image.mode not in _OPAQUE + _ALPHA:
        raise DataError(f"{path}: pixels of Pillow's mode {image.mode}, wanted one of {', '.join(_OPAQUE + _ALPHA)}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        image = image.convert("I").point([round(value / 257) for value in range(1 << 16)], "L")
    elif image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Tells whether a pixel is one number of more than 8 bits, which `Image.convert` would clamp."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _is_16_bit(image: Any) -> bool:
    """Tells whether grey levels are in [0, 65535]. Pillow scales the levels of a PPM file to this range."""
    if image.format == "TIFF":
        bits, photometric = image.tag_v2.get(_BITS_PER_SAMPLE), image.tag_v2.get(_PHOTOMETRIC)
        return image.mode.startswith("I;16") and bits == (16,) and photometric == _BLACK_IS_ZERO
    return image.mode != "F"
