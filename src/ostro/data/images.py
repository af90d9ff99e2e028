"""From an image file to what the vision tower reads: upright RGB pixels on the patch grid, and the tokens that stand
for them.

Where images come from is left to `conversation`, batches to `conversation_collate`. The idea: an image takes a grid of
merged patches, and everything else follows from its size alone. It is scaled down to fit `max_image_size`, then
stretched to whole merged patches; its tokens are one `[IMG]` per merged patch with an `[IMG_BREAK]` after each row, the
last of which is `[IMG_END]`.

Pixels are those of transformers' Pixtral image processor in its Pillow form, bit for bit. They stay 8-bit until they
enter a batch: a colour value has only 256 possible results, so the float32 arithmetic is a table look-up.

Shapes: H, W height and width in pixels after resizing.

Source: transformers.models.pixtral.image_processing_pil_pixtral; layout of tokens: mistral_common ImageEncoder.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from ostro.errors import DataError, LayoutError

Pixels = npt.NDArray[np.uint8]
"""A resized image, `[H, W, 3]`."""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of the colours, red, green, blue, in [0, 1]: the constants of CLIP, which Pixtral kept."""

# Pillow's own limit against images that are small on disk and enormous in memory.
MAX_PIXELS = 89_478_485
# A side of one pixel is a tracking pixel or a failed download; it shows nothing.
MIN_SIDE = 2
# Modes with more than 8 bits per colour, which Pillow's conversion to RGB would clip to white.
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageTokens:
    """How a model turns images into tokens, from its configuration.

    Attributes:
        image_token_id: Id of `[IMG]`, one per merged patch.
        image_break_token_id: Id of `[IMG_BREAK]`, after each row of patches but the last.
        image_end_token_id: Id of `[IMG_END]`, after the last row.
        patch_size: Side of a patch in pixels.
        spatial_merge_size: Patches along a side that become one token.
        max_image_size: Longest side in pixels; larger images are scaled down. A multiple of the merged patch.

    Raises:
        LayoutError: When `max_image_size` is not a multiple of the merged patch.
    """

    image_token_id: int
    image_break_token_id: int
    image_end_token_id: int
    patch_size: int
    spatial_merge_size: int
    max_image_size: int

    def __post_init__(self) -> None:
        """Checks that no image can exceed the grid of the vision tower."""
        if self.max_image_size < self.merged_patch_size or self.max_image_size % self.merged_patch_size:
            raise LayoutError(
                f"vision_config.image_size: must be a multiple of patch_size * spatial_merge_size, "
                f"{self.merged_patch_size}, got {self.max_image_size}"
            )

    @property
    def merged_patch_size(self) -> int:
        """Side in pixels of what becomes one token."""
        return self.patch_size * self.spatial_merge_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of merged patches of an image; at least one of each unless it is extremely narrow.

        Args:
            height: Pixels.
            width: Pixels.
        """
        ratio = max(height / self.max_image_size, width / self.max_image_size)
        if ratio > 1:
            height, width = int(height / ratio), int(width / ratio)
        return (height - 1) // self.merged_patch_size + 1, (width - 1) // self.merged_patch_size + 1

    def token_ids(self, rows: int, columns: int) -> list[int]:
        """The `rows * (columns + 1)` ids that stand for an image.

        Args:
            rows: Rows of merged patches, at least 1.
            columns: Merged patches per row, at least 1.
        """
        ids = ([self.image_token_id] * columns + [self.image_break_token_id]) * rows
        ids[-1] = self.image_end_token_id
        return ids


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet.

    Attributes:
        content: File, the bytes of a file, or an opened image, which is left as it is.
        where: File and row it comes from, the beginning of every error about it.
    """

    content: Path | bytes | Image.Image
    where: str

    def load(self) -> Image.Image:
        """Reads the image.

        Returns:
            The image in RGB, turned as its EXIF says, transparency on white.

        Raises:
            DataError: When there is no such file, it is no image, or it is too small, too large or of too many bits.
        """
        try:
            image = self._open()
            self._check(image)
            # Before the pixels are read: what a PNG says after them would turn some images and not others.
            turned = _is_turned(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image) if turned else image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{self}: too large ({error}); scale it down to at most {MAX_PIXELS} pixels") from error
        except FileNotFoundError as error:
            raise DataError(f"{self}: no such file; image paths start at the folder of the data file") from error
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            reason = str(error).partition(" <_io")[0]
            raise DataError(f"{self}: cannot be read as an image ({reason}); restore it or leave it out") from error

    def __str__(self) -> str:
        """Row and, where it has one, file name."""
        return f"{self.where}: image {self.content}" if isinstance(self.content, Path) else f"{self.where}: image"

    def _open(self) -> Image.Image:
        if isinstance(self.content, Image.Image):
            return self.content
        if isinstance(self.content, bytes):
            return Image.open(io.BytesIO(self.content))
        # The bytes and not the path: Pillow keeps a file open until its pixels are read.
        return Image.open(io.BytesIO(self.content.read_bytes()))

    def _check(self, image: Image.Image) -> None:
        size = f"{image.width} x {image.height} pixels"
        if min(image.size) < MIN_SIDE:
            raise DataError(f"{self}: has {size}, expected at least {MIN_SIDE} on each side; restore or leave it out")
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{self}: too large ({size}); scale it down to at most {MAX_PIXELS} pixels")
        if image.mode.partition(";")[0] in _DEEP_MODES:
            raise DataError(f"{self}: has mode {image.mode}, more than 8 bits per colour; convert it to 8 bits")


def read_pixels(source: ImageSource, tokens: ImageTokens) -> Pixels:
    """Reads an image and resizes it to whole merged patches.

    Args:
        source: The image.
        tokens: Patch sizes and the longest side.

    Returns:
        `[H, W, 3]` uint8; H and W are multiples of the merged patch, at most `max_image_size`.

    Raises:
        DataError: When the image cannot be read, or is so narrow that nothing is left once it is scaled down.
    """
    image = source.load()
    rows, columns = tokens.grid(image.height, image.width)
    if not rows or not columns:
        raise DataError(
            f"{source}: has {image.width} x {image.height} pixels, too narrow: nothing is left of it once its longest "
            f"side is scaled to {tokens.max_image_size}; cut it"
        )
    size = (columns * tokens.merged_patch_size, rows * tokens.merged_patch_size)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def normalize(pixels: Pixels, out: npt.NDArray[np.float32]) -> None:
    """Writes `(pixels / 255 - IMAGE_MEAN) / IMAGE_STD`, channels first.

    Args:
        pixels: `[H, W, 3]`.
        out: `[3, H, W]` float32, also part of a larger array.
    """
    for channel, table in enumerate(_tables()):
        out[channel] = table[pixels[..., channel]]


@functools.cache
def _tables() -> npt.NDArray[np.float32]:
    """`[3, 256]` result of `normalize` for each value, rounded where transformers rounds."""
    rescaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    tables: npt.NDArray[np.float32] = ((rescaled[:, None] - mean) / std).T.copy()
    return tables


def _is_turned(image: Image.Image) -> bool:
    if image.format == "PNG" and "exif" not in image.info:
        return False
    return int(image.getexif().get(ExifTags.Base.Orientation, 1)) != 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
