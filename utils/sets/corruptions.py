"""Common corruptions: images corrupted on the fly as for ImageNet-C, and the published CIFAR-C and ImageNet-C files.

    dataset = CorruptedDataset(index, transform, corruption="fog", severity=3, seed=0, num_classes=1000)
    published = find_published(Path("data/CIFAR-10-C"))
    dataset = published.dataset(transform, "fog", 3)

Both give items and batches of ``utils.data.shards.ShardDataset`` in sequential order, for ``eval_loader``. What is corrupted
here needs the package imagecorruptions, which is imported only then; the published files need nothing.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
The strengths were chosen for 224 px. At 32 px the same numbers are harsher than those of the published CIFAR-10-C.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.digests import files_digest, text_digest
from utils.data.folders import LeftOut, describe, entries_of, is_picture, kind_of, leave, subfolders
from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, decode
from utils.data.shards import SampleDataset, ShardDataset, ShardIndex, ShardReader
from utils.data.skipped import BadSample, Skipped
from utils.data.sources import one_line
from utils.errors import UserError
from utils.methods.attacks import seed_from

logger = logging.getLogger(__name__)

# fmt: off
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
# fmt: on
VALIDATION_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
KNOWN = CORRUPTIONS + VALIDATION_CORRUPTIONS
SEVERITIES = (1, 2, 3, 4, 5)

MOST_CLASSES, MOST_LABELS = 1_000_000, 100_000_000  # CIFAR-100-C has 100 and 50,000
SMALLEST_SIDE = 32  # what the package accepts
OWN_SEED = ("impulse_noise", "glass_blur")  # these do not draw from numpy's global state
# Folders that the archives of the published ImageNet-C may be unpacked into.
ARCHIVES = ("noise", "blur", "weather", "digital", "extra")


# --------------------------------------------------------------------------------------------------- made on the fly


def require_package() -> ModuleType:
    """The package imagecorruptions; UserError where it cannot be imported."""
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(
            f"--attack corruptions: the package imagecorruptions cannot be imported ({error}); "
            "pip install imagecorruptions-imaug"
        ) from None
    return imagecorruptions


def require_image_size(transform: ImageTransform) -> None:
    """UserError where the images that leave ``transform`` are smaller than the package accepts."""
    size = transform.output_size or transform.resize
    side = size if isinstance(size, int) else min(size or (SMALLEST_SIDE,))
    if side < SMALLEST_SIDE:
        raise _too_small(side)


def _too_small(side: int) -> UserError:
    return UserError(
        f"--attack corruptions: images of {side} px; the corruptions are defined from {SMALLEST_SIDE} px on; "
        f"take a model whose images measure at least {SMALLEST_SIDE} px"
    )


def corrupt(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """One of ``KNOWN`` at one of ``SEVERITIES``: uint8 (3, H, W) -> uint8 (3, H, W), 0 ... 255, H and W at least 32.

    The result follows from the arguments alone. numpy's global random state is the same afterwards as before; no other
    thread may draw from it meanwhile. seed: 0 ... 2^32 - 1, all that numpy's generator takes. UserError for a smaller
    image or where the package is missing, ValueError for anything else that is not as said.

    The code is imagecorruptions-imaug's, whose tables are those of ImageNet-C.
    """
    if name not in KNOWN or severity not in SEVERITIES:
        raise ValueError(f"{name!r} at severity {severity!r}: expected one of {', '.join(KNOWN)} at 1 ... 5")
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise ValueError(f"expected a uint8 image (3, H, W), found {image.dtype} {tuple(image.shape)}")
    if min(image.shape[1:]) < SMALLEST_SIDE:
        raise _too_small(min(image.shape[1:]))
    state = np.random.get_state()  # before the import, which might draw as well
    try:
        package = require_package()
        np.random.seed(seed)
        pixels = package.corrupt(
            image.permute(1, 2, 0).contiguous().numpy(),
            severity=severity,
            corruption_name=name,
            **({"seed": seed} if name in OWN_SEED else {}),
        )
    finally:
        np.random.set_state(state)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def corruption_seed(seed: int, corruption: str, severity: int, shard: int, sample: int) -> int:
    """A 32-bit seed for one image, whoever reads it and in whichever batch."""
    return seed_from(seed, corruption, severity, shard, sample) % 2**32  # what numpy takes


def warm_up(name: str, severity: int) -> None:
    """Imports the package and compiles what it compiles, for the workers that are forked later (3 s for glass_blur)."""
    require_package()
    import cv2

    # Workers are processes already, and OpenCV's idle threads spin. It has to be said before the fork: a child that
    # changes the number of threads waits for those of its parent, which do not exist there.
    cv2.setNumThreads(1)
    # glass_blur is compiled once more at severity 3, where all its parameters are whole numbers.
    corrupt(torch.zeros(3, SMALLEST_SIDE, SMALLEST_SIDE, dtype=torch.uint8), name, severity, seed=0)


class CorruptedDataset(ShardDataset):
    """Labelled images in order, each corrupted after ``transform``, that is at the resolution which the encoder sees.

    Raises UserError where the package is missing or the images are too small.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: ImageTransform,
        *,
        corruption: str,
        severity: int,
        seed: int,
        num_classes: int,
    ) -> None:
        super().__init__(index, transform, order="sequential", seed=seed, with_labels=True, num_classes=num_classes)
        self.corruption, self.severity = corruption, severity
        require_image_size(transform)
        warm_up(corruption, severity)

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        item = super().load(reader, shard, sample, epoch)
        seed = corruption_seed(self.seed, self.corruption, self.severity, shard, sample)
        return item | {"image": corrupt(item["image"], self.corruption, self.severity, seed)}


# ----------------------------------------------------------------------------------------------------- published files


def find_published(folder: Path) -> PublishedCorruptions | None:
    """The corruptions in a folder of the published files; None where it holds none.

    CIFAR-10-C, CIFAR-100-C: labels.npy and <corruption>.npy, uint8 (5 n, 32, 32, 3); severity s is rows (s - 1) n to
    s n, the last not counted.
    ImageNet-C: <corruption>/<severity>/<class folder>/*.JPEG, also inside noise/, blur/, weather/, digital/, extra/; a
    class is the rank of its folder's name.

    All headers and folder names are looked at here, so that a mistake shows before anything is measured: UserError.
    """
    arrays = {name: folder / f"{name}.npy" for name in KNOWN if (folder / f"{name}.npy").is_file()}
    if arrays:
        labels = _read_labels(folder / "labels.npy")
        for path in arrays.values():
            _check_images(path, labels)
        return PublishedCorruptions(folder, arrays, int(labels.max()) + 1, labels)
    places = {name: place for name in KNOWN if (place := _find_severities(folder, name)) is not None}
    if not places:
        return None
    first: Path | None = None
    classes: list[str] = []
    for place in places.values():
        for path in filter(Path.is_dir, (place / str(severity) for severity in SEVERITIES)):
            found = _class_folders(path)
            if first is None:
                first, classes = path, found
            elif found != classes:
                # Ranks would shift, and nearly every label with them.
                odd = min(set(found) ^ set(classes))
                has, lacks = (path, first) if odd in found else (first, path)
                raise UserError(
                    f"{lacks}: no class folder {odd}, which {has} holds; expected the same classes for all corruptions "
                    "and severities; unpack the archive again"
                )
    return PublishedCorruptions(folder, places, len(classes))


@dataclass(frozen=True)
class PublishedCorruptions:
    """What ``find_published`` found. places: corruption -> .npy file, or folder of severities (labels is None then)."""

    folder: Path
    places: dict[str, Path]
    num_classes: int
    labels: np.ndarray | None = None

    @property
    def corruptions(self) -> list[str]:
        """The names found, in the order of ``KNOWN``."""
        return list(self.places)

    def num_samples(self, corruption: str, severity: int) -> int:
        """UserError where the corruption or the severity is missing."""
        return len(self._images(corruption, severity))

    def dataset(self, transform: ImageTransform, corruption: str, severity: int) -> PublishedDataset:
        """The images of one corruption and severity. UserError where it is missing."""
        return PublishedDataset(self._images(corruption, severity), transform)

    def digest(self, corruption: str, severity: int, num_samples: int | None, cache_dir: str | None) -> str:
        """Of the files that hold the first ``num_samples`` images of one corruption and severity, and of their labels.

        UserError where the corruption or the severity is missing, or a file cannot be read.
        """
        images = self._images(corruption, severity)
        try:
            return text_digest([files_digest(images.paths(num_samples), cache_dir), *images.names(num_samples)])
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); check its permissions or unpack it again"
            ) from None

    def _images(self, corruption: str, severity: int) -> ArrayImages | FolderImages:
        if severity not in SEVERITIES:
            raise ValueError(f"severity is 1 ... 5, not {severity!r}")
        if corruption not in self.places:
            raise UserError(
                f"{self.folder}: no {corruption}; found {', '.join(self.places)}; add its files or leave it out"
            )
        place = self.places[corruption]
        if self.labels is not None:
            each = len(self.labels) // len(SEVERITIES)
            first = (severity - 1) * each
            return ArrayImages(place, first, self.labels[first : first + each])
        path = place / str(severity)
        if not path.is_dir():
            found = [str(other) for other in SEVERITIES if (place / str(other)).is_dir()]
            raise UserError(
                f"{place}: no severity {severity}; found {', '.join(found)}; unpack its archive again or leave it out"
            )
        return _list_images(path)


@dataclass(frozen=True)
class ArrayImages:
    """One severity of a CIFAR-C array: rows ``first`` ... of the .npy file. labels: int64 (n,)."""

    path: Path
    first: int
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def paths(self, num_samples: int | None) -> list[Path]:
        return [self.path]  # the whole of it: its severities are remembered together

    def names(self, num_samples: int | None) -> list[str]:
        return list(map(str, self.labels[:num_samples]))

    def read(self, slot: int, transform: ImageTransform) -> dict[str, Any]:
        """key, label and image uint8 (3, H, W). BadSample where the file is gone."""
        label, row = int(self.labels[slot]), self.first + slot
        try:
            # Mapped anew for every image (0.1 ms): a mapping that is kept would be sent to workers as a whole copy.
            pixels = np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[row])
        except (OSError, ValueError, IndexError) as error:
            raise BadSample("missing image", f"{self.path}#{row}", one_line(error)) from None
        return {"key": f"{slot:05d}", "label": label, "image": transform(Image.fromarray(pixels))}


@dataclass(frozen=True)
class FolderImages:
    """One severity of an ImageNet-C corruption. files: (file name, class folder, class)."""

    path: Path
    files: list[tuple[str, str, int]]

    def __len__(self) -> int:
        return len(self.files)

    def paths(self, num_samples: int | None) -> list[Path]:
        return [self.path / folder / name for name, folder, _ in self.files[:num_samples]]

    def names(self, num_samples: int | None) -> list[str]:
        return [f"{folder!r} {name!r} {label}" for name, folder, label in self.files[:num_samples]]

    def read(self, slot: int, transform: ImageTransform) -> dict[str, Any]:
        """key, label and image uint8 (3, H, W). BadSample where the file cannot be read or decoded."""
        name, folder, label = self.files[slot]
        path = self.path / folder / name
        try:
            with path.open("rb") as file:
                image = decode(file.read(MAX_IMAGE_BYTES + 1), transform)
        except OSError as error:
            raise BadSample("missing image", str(path), error.strerror or one_line(error)) from None
        except ImageError as error:
            raise BadSample("undecodable image", str(path), str(error)) from None
        return {"key": f"{folder}/{name}", "label": label, "image": image}


@dataclass
class PublishedIndex:
    """A ``utils.data.skipped.SampleIndex``: of published files nothing is missing."""

    num_samples: int
    skipped: list[Skipped] = field(default_factory=list)


class PublishedDataset(SampleDataset):
    """An item is that of a sequential ``ShardDataset`` with labels."""

    def __init__(self, images: ArrayImages | FolderImages, transform: ImageTransform) -> None:
        super().__init__(PublishedIndex(len(images)), transform)
        self.images = images

    def __getitem__(self, reference: tuple[int, int, int]) -> dict[str, Any]:
        _, slot, position = reference
        try:
            item, skipped = self.images.read(slot, self.transform), []
        except BadSample as bad:
            item, skipped = {"image": None, "key": bad.skipped.where}, [bad.skipped]
        return {**item, "position": position, "skipped": skipped}


def _read_array(path: Path, expected: str) -> np.ndarray:
    try:
        # Mapped, so that only the header is read; a pickle, which can run code, is refused.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected {expected}; download it again") from None
    except Exception as error:
        # OSError, ValueError, EOFError, BadZipFile and others, depending on what the file is.
        raise UserError(
            f"{path}: cannot be read as an array ({one_line(error)}); expected {expected}; download it again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: an archive of arrays; expected {expected}; download it again")
    return array


def _read_labels(path: Path) -> np.ndarray:
    """int64 (5 n,) of a CIFAR-C folder, every severity's labels after another."""
    expected = "whole numbers (5 * n,) from 0 on, the labels of the images beside it"
    labels = _read_array(path, expected)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) % len(SEVERITIES):
        raise UserError(f"{path}: {labels.dtype} {labels.shape}; expected {expected}; download it again")
    if not 0 < len(labels) <= MOST_LABELS:
        raise UserError(f"{path}: {len(labels)} labels; expected {expected}; download it again")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        odd = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{path}: label {odd}; expected {expected}; download it again")
    return labels.astype(np.int64)


def _check_images(path: Path, labels: np.ndarray) -> None:
    expected = "uint8 (5 * n, 32, 32, 3), the severities after one another"
    images = _read_array(path, expected)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % len(SEVERITIES):
        raise UserError(
            f"{path}: {images.dtype} {images.shape}; expected {expected}; download it again or take it out of the "
            "folder"
        )
    if len(images) != len(labels):
        raise UserError(
            f"{path.parent / 'labels.npy'}: {len(labels)} labels, {path.name} holds {len(images)} images; expected one "
            "label per image; download both again"
        )


def _find_severities(folder: Path, name: str) -> Path | None:
    """The folder of one ImageNet-C corruption."""
    places = [
        place
        for place in (folder / name, *(folder / archive / name for archive in ARCHIVES))
        if any((place / str(severity)).is_dir() for severity in SEVERITIES)
    ]
    if len(places) > 1:
        raise UserError(f"{places[0]} and {places[1]}: both hold {name}; expected one of them; remove the other")
    return places[0] if places else None


def _class_folders(path: Path) -> list[str]:
    names = subfolders(path)
    if not names:
        raise UserError(f"{path}: no class folders; expected <class folder>/*.JPEG; unpack the archive again")
    return names


def _list_images(path: Path) -> FolderImages:
    """By file name: ILSVRC2012_val_... is mixed over the classes, so that the first N images are a fair sample."""
    files = []
    left_out: LeftOut = {}
    for label, folder in enumerate(_class_folders(path)):
        for entry in entries_of(path / folder):
            # Before the suffix: a pipe would be waited for without end.
            if kind_of(entry) == "file" and is_picture(entry.name):
                files.append((entry.name, folder, label))
            else:
                leave(left_out, entry, path)
    if left_out:
        logger.warning("%s: not taken: %s", path, describe(left_out))
    if not files:
        raise UserError(f"{path}: no images; expected <class folder>/*.JPEG; unpack the archive again")
    return FolderImages(path, sorted(files))
