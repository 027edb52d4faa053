"""Image files of every mode, orientation and format are read correctly, or refused with the name of the file."""

import io
import os
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from vmoe_routers.training import DataError, load
from vmoe_routers.training.pictures import read_picture

GREY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
DEEP = GREY.astype(np.uint16) * 257  # the same levels in 16 bits
COLOURS = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


def pixels(path):
    image = read_picture(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(levels):
    return np.repeat(np.asarray(levels)[..., None], 3, axis=2)


def refused(path, words):
    with pytest.raises(DataError, match=words) as error:
        read_picture(str(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_grey_of_8_and_16_bits(tmp_path, suffix):
    np.testing.assert_array_equal(pixels(saved(tmp_path / f"8.{suffix}", Image.fromarray(GREY))), grey(GREY))
    deep = Image.fromarray(DEEP)
    if suffix == "pgm":
        (tmp_path / "16.pgm").write_bytes(b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        assert deep.mode == "I;16"
        deep.save(tmp_path / f"16.{suffix}")
    np.testing.assert_array_equal(pixels(tmp_path / f"16.{suffix}"), grey(GREY))


def test_uniform_16_bit_values_stay_uniform(tmp_path):
    """Values above 255 are not clamped. An earlier version clamped them, and 97.7 % became white."""
    deep = np.random.default_rng(0).integers(0, 1 << 16, (64, 64), dtype=np.uint16)
    found = pixels(saved(tmp_path / "a.png", Image.fromarray(deep)))[..., 0] / 255
    assert abs(found.mean() - 0.5) < 0.02 and (found == 1).mean() < 0.01


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "png"), ("P", "png"), ("CMYK", "tiff"), ("YCbCr", "tiff")])
def test_opaque_colours(tmp_path, mode, suffix):
    if mode == "YCbCr" and PIL.__version__.startswith("12.3."):
        pytest.skip("Pillow 12.3 cannot read the YCbCr TIFF that it wrote")
    image = Image.fromarray(COLOURS)
    image = image.quantize(6) if mode == "P" else image.convert(mode)
    found = pixels(saved(tmp_path / f"a.{suffix}", image))
    np.testing.assert_allclose(found, np.asarray(image.convert("RGB")), atol=2)
    assert np.abs(found.astype(int) - COLOURS).mean() < 3


def test_one_bit(tmp_path):
    found = pixels(saved(tmp_path / "a.png", Image.fromarray(GREY > 100)))
    np.testing.assert_array_equal(found, grey((GREY > 100) * np.uint8(255)))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """Transparent pixels of any colour become white: opaque black, half transparent black, transparent red."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 128), (255, 0, 0, 0)])
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putdata([0, 1, 2])
        image.putpalette([0, 0, 0, 0, 0, 0, 255, 0, 0])
        path = saved(tmp_path / "a.png", image, transparency=bytes([255, 128, 0]))
    else:
        path = saved(tmp_path / "a.png", image.convert(mode))
    assert pixels(path).tolist() == [[[0] * 3, [127] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path, mode):
    image = Image.new("L", (2, 1))
    image.putdata([0, 255])
    black = (0, 0, 0) if mode == "RGB" else 0
    assert pixels(saved(tmp_path / "a.png", image.convert(mode), transparency=black)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("levels", [GREY, DEEP], ids=["8", "16"])
def test_pictures_are_turned_upright(tmp_path, orientation, suffix, levels):
    upright = grey(GREY)
    # A camera stores the picture with the inverse of the rotation or flip that the orientation names.
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation](levels)))
    np.testing.assert_array_equal(pixels(saved(tmp_path / f"a.{suffix}", stored, exif=exif)), upright)


@pytest.mark.parametrize(("levels", "suffix"), [
    (GREY.astype(np.float32), "tiff"), (GREY.astype(np.int32), "tiff"), (DEEP.astype(np.int16), "tiff"),
], ids=["F", "I", "I;16S"])  # fmt: skip
def test_numbers_of_an_unknown_range_are_refused(tmp_path, levels, suffix):
    refused(saved(tmp_path / f"a.{suffix}", Image.fromarray(levels)), "pixels of Pillow's mode [FI], wanted 8 bits")


def test_other_kinds_of_16_bits_are_refused(tmp_path):
    refused(saved(tmp_path / "a.png", Image.fromarray(DEEP), transparency=0), "16-bit grey with a transparent level")
    white_at_0 = {262: 0}
    refused(saved(tmp_path / "a.tiff", Image.fromarray(DEEP), tiffinfo=white_at_0), "or 16 with black at 0")
    refused(saved(tmp_path / "lab.tiff", Image.new("LAB", (2, 2))), "Pillow's mode LAB, wanted one of")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF"])
def test_several_frames_are_refused(tmp_path, format):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first.save(tmp_path / "one.png", format)
    assert pixels(tmp_path / "one.png").shape == (4, 4, 3)
    first.save(tmp_path / "two.png", format, save_all=True, append_images=[second])
    refused(tmp_path / "two.png", "an animation or a document of 2 frames")


def test_the_first_picture_of_a_photograph(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    red, _, blue = pixels(tmp_path / "a.jpg").mean((0, 1))
    assert red > 200 > 50 > blue


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks, width=1, height=1):
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


ROW = chunk(b"IDAT", zlib.compress(b"\0\0"))


@pytest.mark.parametrize(("content", "words"), [
    (png(ROW, width=30_000, height=30_000), "cannot be read: Image size .900000000 pixels. exceeds limit"),
    (png(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64_000_000))), ROW), "cannot be read: Decompressed data too"),
    (png(ROW, width=200), "200 x 1 pixels, wanted sides of at most 100 to 1"),
    (png(chunk(b"IDAT", b"rubbish")), "cannot be read: "),
    (png(chunk(b"IDAT", zlib.compress(bytes(2)))[:-9]), "cannot be read: "),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read: cannot identify image file"),
    (b"", "cannot be read: cannot identify image file"),
], ids=["bomb", "zTXt", "strip", "damaged", "truncated", "EPS", "empty"])  # fmt: skip
def test_refuses_by_name(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path / "a.png", words)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing"])
def test_refuses_what_is_no_regular_file_without_opening_it(tmp_path, kind):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(GREY).save(tmp_path / part / name / "b.png")
    path = tmp_path / "train" / "ant" / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(DataError, match=r"train/ant/a\.png: not a regular file"):
        load(str(tmp_path))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM"])
def test_fuzz(tmp_path, format):
    """Reading a damaged file gives a picture or raises DataError."""
    draw, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, format)
    for _ in range(60):
        data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        data[draw.integers(0, len(data), 3)] = draw.integers(0, 256, 3)
        (tmp_path / "a.png").write_bytes(data[: draw.integers(1, len(data) + 1)].tobytes())
        try:
            assert pixels(tmp_path / "a.png").dtype == np.uint8
        except DataError as error:
            assert "a.png: " in str(error)
