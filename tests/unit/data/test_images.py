"""Pixels and tokens of images, against transformers' processor and mistral_common's layout."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from ostro.data.images import MAX_PIXELS, ImageSource, ImageTokens, normalize, read_pixels
from ostro.errors import DataError, LayoutError
from tests.unit.data.conversation_files import IMAGE_TOKENS, picture, png

MERGED = IMAGE_TOKENS.merged_patch_size
PROCESSOR = PixtralImageProcessorPil(
    patch_size={"height": MERGED, "width": MERGED}, size={"longest_edge": IMAGE_TOKENS.max_image_size}
)


def _read(image: Image.Image | bytes | Path) -> np.ndarray:
    return read_pixels(ImageSource(image, "data.jsonl:3"), IMAGE_TOKENS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(64, 64), (10, 7), (33, 16), (200, 64), (47, 900), (65, 2)])
def test_pixels_are_those_of_transformers_bit_for_bit(mode: str, size: tuple[int, int]) -> None:
    image = picture(*size, mode=mode)
    expected = PROCESSOR(image, return_tensors="np")
    pixels = _read(image)
    assert pixels.shape[:2] == tuple(expected["image_sizes"][0])
    result = np.empty((3, *pixels.shape[:2]), np.float32)
    normalize(pixels, result)
    np.testing.assert_array_equal(result, expected["pixel_values"][0])


def test_a_transparent_palette_is_put_on_white() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    assert np.unique(_read(file.getvalue())).tolist() == [255]


@pytest.mark.parametrize("seed", range(20))
def test_the_grid_is_that_of_transformers(seed: int) -> None:
    width, height = np.random.default_rng(seed).integers(2, 300, 2).tolist()
    expected = PROCESSOR(picture(width, height), return_tensors="np")["image_sizes"][0]
    assert [side * MERGED for side in IMAGE_TOKENS.grid(height, width)] == list(expected)


def test_tokens_are_those_of_mistral_common(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral_common.protocol.instruct.chunk import ImageChunk

    monkeypatch.setattr("mistral_common.tokens.tokenizers.image.transform_image", lambda image, size: None)
    stock = ImageEncoder(ImageConfig(8, 64, 2), SpecialImageIDs(img=10, img_break=12, img_end=13))
    for width, height in [(16, 16), (17, 16), (64, 30), (3, 64)]:
        expected = stock(ImageChunk(image=picture(width, height))).tokens
        assert IMAGE_TOKENS.token_ids(*IMAGE_TOKENS.grid(height, width)) == expected


def test_photos_stand_upright() -> None:
    left_red = Image.new("RGB", (64, 32))
    left_red.paste((255, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    for form in ("JPEG", "PNG"):
        file = io.BytesIO()
        left_red.save(file, form, exif=exif)
        pixels = _read(file.getvalue())
        assert pixels.shape == (64, 32, 3)
        assert pixels[:16, :, 0].min() > 200
        assert pixels[48:, :, 0].max() < 50


def test_bytes_files_and_opened_images_give_the_same(tmp_path: Path) -> None:
    image = picture(40, 20)
    image.save(tmp_path / "a.png")
    expected = _read(image)
    assert (_read(tmp_path / "a.png") == expected).all()
    assert (_read(png(image)) == expected).all()
    assert image == picture(40, 20)


def _png_header(width: int, height: int) -> bytes:
    """A PNG of a stated size that ends where its pixels should begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "cannot be read as an image \\(cannot identify image file\\); restore it or leave it out"),
        (b"", "cannot be read as an image"),
        (png(picture(64, 64))[:3000], "cannot be read as an image"),
        (picture(1, 1), "has 1 x 1 pixels, expected at least 2 on each side"),
        (picture(1, 900), "has 1 x 900 pixels, expected at least 2"),
        (
            picture(900, 2),
            "has 900 x 2 pixels, too narrow: nothing is left of it once its longest side is scaled to 64",
        ),
        (_png_header(30_000, 30_000), f"too large \\(.*900000000.*\\); scale it down to at most {MAX_PIXELS} pixels"),
        (_png_header(10_000, 9_000), "too large \\(.*90000000.*\\); scale it down"),
        (Image.new("I;16", (16, 16)), "has mode I;16, more than 8 bits per colour; convert it to 8 bits"),
        (Image.new("F", (16, 16)), "has mode F, more than 8 bits"),
        (Path("gone.png"), " gone.png: no such file; image paths start at the folder of the data file"),
        (Path("."), " .: cannot be read as an image \\(.*[Dd]irectory"),
    ],
)
def test_bad_images_are_refused_with_their_row(content: Image.Image | bytes | Path, message: str) -> None:
    with pytest.raises(DataError, match=f"^data.jsonl:3: image.*{message}"):
        _read(content)


def test_an_opened_image_may_not_be_enormous_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostro.data.images.MAX_PIXELS", 1000)
    with pytest.raises(
        DataError, match=r"^data.jsonl:3: image: too large \(40 x 30 pixels\); scale it down to at most"
    ):
        _read(picture(40, 30))


@pytest.mark.parametrize("max_image_size", [0, 8, 63, 100])
def test_a_longest_side_that_is_no_whole_patch_is_refused(max_image_size: int) -> None:
    with pytest.raises(LayoutError, match=f"^vision_config.image_size: must be a multiple .* 16, got {max_image_size}"):
        ImageTokens(10, 12, 13, patch_size=8, spatial_merge_size=2, max_image_size=max_image_size)
