"""Image bytes to uint8 pixels: what a Hugging Face image processor does before it rescales and normalises.

Plain Pillow, 1.2 (large photographs) to 2.4 times (small images) as fast as the processor, with the same pixels
(``tests/test_images.py`` compares them). The models take ``pixel_values`` in [0, 1] and normalise inside, so that attacks
work on pixels; what leaves here is uint8, a quarter of the memory and of the copy to the GPU.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils.errors import UserError

# What Pillow decodes without a warning (it refuses twice as much): 341 MiB at its four bytes a pixel. Kept even where some
# library lifts that limit. Also the most that resizing may make of an image: of 1 x 60,000 pixels it would make 3e9.
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535  # pixels, JPEG's own; the filter of a longer side alone would take 32 bytes a pixel of it
MAX_OUTPUT_SIDE = 4096  # of what a model takes; they take 224 to 1024
MAX_IMAGE_BYTES = 256 << 20  # of an encoded image: three bytes for each of MAX_PIXELS, which is no compression at all

# Readers for what image sets hold under .jpg, .jpeg, .png and .webp. Without the list Pillow would try every format it
# knows on untrusted bytes, down to PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


_BLOCK = bytes(512)
_NOT_ZERO = re.compile(rb"[^\0]")


class ImageError(ValueError):
    """Bytes that are no whole image; the text says why."""


@dataclass(frozen=True)
class ImageTransform:
    """Convert to RGB (transparency onto white), resize, centre crop.

    resize: length of the shorter edge, the longer one keeps the proportions, rounded down; or exactly (height, width);
        or None for no resizing.
    crop: (height, width) cut from the centre, with a black frame where the image is smaller; or None.
    resample: Pillow's filter number, 3 is bicubic.
    draft: let JPEG decode at 1/2, 1/4 or 1/8 of its size where that is still twice the size wanted: for 224 pixels from
        a shorter edge of 896 on. Two to three times faster there, but the pixels differ slightly from the processor's
        (about 50 dB; half the size, no more than what is wanted, would be 34 to 44 dB).
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    resample: int = int(Image.Resampling.BICUBIC)
    draft: bool = False

    @classmethod
    def from_processor(cls, image_processor: Any, *, draft: bool = False) -> ImageTransform:
        """Reads size, crop_size and resample of a Hugging Face image processor; UserError for a kind not known here.

        SigLIP 2's processor (NaFlex) makes images of any proportions into at most so many patches. Here they become the
        square that holds as many: resized by the shorter edge and cropped, which for square images is the same.
        """
        name = type(image_processor).__name__
        if name.startswith("Siglip2ImageProcessor"):
            side = math.isqrt(image_processor.max_num_patches) * image_processor.patch_size
            if not 1 <= side <= MAX_OUTPUT_SIDE:
                raise UserError(f"{name}: {side} pixels a side; expected 1 to {MAX_OUTPUT_SIDE}")
            return cls(side, (side, side), int(image_processor.resample), draft)
        for step in ("do_pad", "do_flip_channel_order", "do_reduce_labels"):
            if getattr(image_processor, step, None):
                raise UserError(f"{name}: {step} is not supported; expected resizing and centre cropping only")
        resize: int | tuple[int, int] | None = None
        if getattr(image_processor, "do_resize", True):
            size = {key: value for key, value in dict(image_processor.size).items() if value is not None}
            if set(size) == {"shortest_edge"}:
                resize = int(size["shortest_edge"])
            elif set(size) == {"height", "width"}:
                resize = (int(size["height"]), int(size["width"]))
            else:
                raise UserError(f"{name}: size {size} is not supported; expected shortest_edge, or height and width")
        crop = None
        if getattr(image_processor, "do_center_crop", False):
            crop = (int(image_processor.crop_size["height"]), int(image_processor.crop_size["width"]))
        sizes = [*(resize if isinstance(resize, tuple) else (resize or 1, resize or 1)), *(crop or (1, 1))]
        if min(sizes) < 1 or max(sizes) > MAX_OUTPUT_SIDE:
            raise UserError(f"{name}: size {resize} and crop {crop}; expected 1 to {MAX_OUTPUT_SIDE} pixels a side")
        resample = getattr(image_processor, "resample", None)
        # The processors' own default where nothing is set is bilinear.
        return cls(resize, crop, int(Image.Resampling.BILINEAR if resample is None else resample), draft)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every image that leaves, or None where it depends on the image."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pillow image -> uint8 tensor (3, H, W), 0 ... 255."""
        # A draft changes the size, and the proportions by a pixel: the size wanted follows from the original.
        size = self._resized(*image.size)
        if size is not None:
            # Pillow resizes the rows first: between the two passes it holds the new width at the old height.
            most = size[0] * max(size[1], image.height)
            if most > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} would take {most} pixels to resize")
        box = None
        if self.draft and size is not None and image.format in ("JPEG", "MPO"):
            # The picture's part of what is decoded, which is whole pixels: without it 1201 x 1803 loses 13 dB.
            _, box = image.draft(None, (2 * size[0], 2 * size[1])) or (None, None)
        image = _to_rgb(image)
        if size is not None:
            image = image.resize(size, resample=self.resample, box=box)
        pixels = np.array(image)
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _resized(self, width: int, height: int) -> tuple[int, int] | None:
        """(width, height) after resizing."""
        if self.resize is None:
            return None
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)


def decode(data: bytes, transform: ImageTransform) -> torch.Tensor:
    """Encoded image -> uint8 tensor (3, H, W); ImageError for anything but a whole image within the limits above.

    The limits are checked on the header, before pixels are decoded. Of an animation the first frame counts. Texts and colour
    profiles, which may be compressed too, are bounded by Pillow: 1 MiB each, 64 MiB in all.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise ImageError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
    if hole := _find_hole(data):
        raise ImageError(f"zeros from byte {hole[0]} to {hole[1]}, as where a disk has lost blocks")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            return transform(image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others, depending on the damage.
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _find_hole(data: bytes) -> tuple[int, int] | None:
    """The first and last byte of zeros that fill whole blocks: what a disk or a broken copy has lost.

    Decoders of JPEG and WebP make pixels of them without a word. Files, and members of a tar, begin with a block. Zeros that
    belong to an image, of a flat one for example, begin and end anywhere.
    """
    start = data.find(_BLOCK)
    while start >= 0:
        after = _NOT_ZERO.search(data, start)
        end = after.start() if after else len(data)
        whole = data[max(0, start - 2) : start] == b"\xff\xd9"  # a JPEG that is filled up
        if start % len(_BLOCK) == 0 and (end % len(_BLOCK) == 0 or end == len(data)) and not whole:
            return start, end
        start = data.find(_BLOCK, end)
    return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height} pixels, at most {MAX_PIXELS} of {MAX_SIDE} a side are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central (height, width) of ``pixels`` (H, W, 3). Odd differences round as the image processors round them."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    source = pixels[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
    below, right = max(0, -top), max(0, -left)
    canvas[below : below + source.shape[0], right : right + source.shape[1]] = source
    return canvas
