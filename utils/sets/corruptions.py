"""Common corruptions: made on the fly as for ImageNet-C, or read from the published files of CIFAR-C and ImageNet-C.

    dataset = CorruptedDataset(index, transform, corruption="fog", severity=3, seed=0, num_classes=1000)
    dataset = find_published(Path("data/CIFAR-10-C")).dataset(transform, "fog", 3)

Only the first line needs the package imagecorruptions. Source: Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019. The severities were chosen for 224 px; at 32 px the same
severities are harsher than in the published CIFAR-10-C.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.digests import files_digest, text_digest
from utils.data.folders import LeftOut, describe, pictures, subfolders
from utils.data.images import MAX_IMAGE_BYTES, ImageError, ImageTransform, decode
from utils.data.shards import ShardDataset, ShardIndex, ShardReader
from utils.data.skipped import BadSample
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
SMALLEST_SIDE = 32  # pixels; the package refuses smaller images
OWN_SEED = ("impulse_noise", "glass_blur")  # these take a seed instead of drawing from numpy's global state
ARCHIVES = ("noise", "blur", "weather", "digital", "extra")  # of ImageNet-C; each holds several corruptions


def require_package() -> ModuleType:
    """Imports the package imagecorruptions. UserError if that fails."""
    try:
        import imagecorruptions
    except ImportError as error:
        what = f"the package imagecorruptions cannot be imported ({error})"
        raise UserError(f"--attack corruptions: {what}; pip install imagecorruptions-imaug") from None
    return imagecorruptions


def require_side(side: int) -> None:
    """UserError if images are smaller than the package accepts."""
    if side < SMALLEST_SIDE:
        raise UserError(f"--attack corruptions: images of {side} px; take a model of at least {SMALLEST_SIDE} px")


def corrupt(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Applies one of ``KNOWN`` at one of ``SEVERITIES``: uint8 (3, H, W) -> uint8 (3, H, W), 0 ... 255, H, W >= 32.

    The result depends only on the arguments; seed: 0 ... 2^32 - 1. numpy's global random state is changed and restored,
    so no other thread may draw from it during the call. Source: imagecorruptions-imaug, with the tables of ImageNet-C.
    UserError for a smaller image or a missing package.
    """
    require_side(min(image.shape[1:]))
    own_seed = {"seed": seed} if name in OWN_SEED else {}
    state = np.random.get_state()  # before the import, which might draw too
    try:
        package = require_package()
        np.random.seed(seed)
        pixels = package.corrupt(image.permute(1, 2, 0).contiguous().numpy(), severity, name, **own_seed)
    finally:
        np.random.set_state(state)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def corruption_seed(seed: int, corruption: str, severity: int, shard: int, sample: int) -> int:
    """A 32-bit seed for one image, the same for every batch size and number of processes."""
    return seed_from(seed, corruption, severity, shard, sample) % 2**32  # numpy's range


def warm_up(name: str, severity: int) -> None:
    """Imports the package and compiles its functions before the workers are forked (3 s for glass_blur)."""
    require_package()
    import cv2

    # Workers are processes already, and OpenCV's idle threads burn CPU time. Set this before the fork: a child that
    # changes the number of threads would wait for its parent's threads, which do not exist in the child.
    cv2.setNumThreads(1)
    # Use this severity: glass_blur is compiled again for severity 3, where all its parameters are integers.
    corrupt(torch.zeros(3, SMALLEST_SIDE, SMALLEST_SIDE, dtype=torch.uint8), name, severity, seed=0)


class CorruptedDataset(ShardDataset):
    """Labelled images in order, corrupted after ``transform``, that is at the resolution of the encoder's input."""

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
        size = transform.output_size or transform.resize or SMALLEST_SIDE
        require_side(size if isinstance(size, int) else min(size))
        warm_up(corruption, severity)

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        item = super().load(reader, shard, sample, epoch)
        seed = corruption_seed(self.seed, self.corruption, self.severity, shard, sample)
        return item | {"image": corrupt(item["image"], self.corruption, self.severity, seed)}


def find_published(folder: Path) -> PublishedCorruptions | None:
    """The corruptions in a folder of published files; None if there are none, UserError if the files do not match.

    CIFAR-C: labels.npy and <corruption>.npy, uint8 (5 n, 32, 32, 3), severity s in rows (s - 1) n to s n.
    ImageNet-C: <corruption>/<severity>/<class folder>/*.JPEG, also inside ``ARCHIVES``; a class is its folder's rank.
    """
    arrays = {name: folder / f"{name}.npy" for name in KNOWN if (folder / f"{name}.npy").is_file()}
    if arrays:
        labels = _read_labels(folder / "labels.npy")
        expected = "uint8 (5 * n, 32, 32, 3), the severities after one another; download it again"
        for path in arrays.values():
            images = _read_array(path, "B", (32, 32, 3), expected)
            if len(images) != len(labels):
                found = f"{len(labels)} labels, {path.name} holds {len(images)} images"
                raise UserError(f"{folder / 'labels.npy'}: {found}; expected one label each; download both again")
        return PublishedCorruptions(folder, arrays, int(labels.max()) + 1, labels)

    places: dict[str, Path] = {}
    for name in KNOWN:
        around = [folder / name, *(folder / archive / name for archive in ARCHIVES)]
        for place in filter(_severities, around):
            if name in places:
                raise UserError(f"{places[name]} and {place}: both hold {name}; expected one of them; remove the other")
            places[name] = place
    if not places:
        return None
    first, *others = (place / severity for place in places.values() for severity in _severities(place))
    classes = _class_folders(first)
    for path in others:
        if odd := set(classes) ^ set(_class_folders(path)):  # else ranks shift, and so do most labels
            has, lacks = (first, path) if min(odd) in classes else (path, first)
            found = f"no class folder {min(odd)}, which {has} holds"
            raise UserError(f"{lacks}: {found}; expected the same classes everywhere; unpack the archive again")
    return PublishedCorruptions(folder, places, len(classes))


class PublishedSample(NamedTuple):
    """One image. key: for ImageNet-C <class folder>/<file>. row: its row in the array, or None for a file."""

    key: str
    label: int
    row: int | None = None


@dataclass(frozen=True)
class PublishedCorruptions:
    """The result of ``find_published``. places: corruption -> .npy file, or folder of severities if labels is None."""

    folder: Path
    places: dict[str, Path]
    num_classes: int
    labels: np.ndarray | None = None

    @property
    def corruptions(self) -> list[str]:
        """The names found, in the order of ``KNOWN``."""
        return list(self.places)

    def dataset(self, transform: ImageTransform, corruption: str, severity: int) -> PublishedDataset:
        """The images of one corruption and severity. UserError if it is missing."""
        return PublishedDataset(*self._samples(corruption, severity), transform)

    def digest(self, corruption: str, severity: int, num_samples: int | None, cache_dir: str | None) -> str:
        """A digest of the files of the first ``num_samples`` images and their labels. UserError if one is missing."""
        path, samples = self._samples(corruption, severity)
        samples = samples[:num_samples]
        if self.labels is None:
            files = [path / sample.key for sample in samples]
            lines = [" ".join(map(repr, (*sample.key.split("/"), sample.label))) for sample in samples]
        else:  # the whole array: one cached digest serves all its severities
            files, lines = [path], [str(sample.label) for sample in samples]
        try:
            return text_digest([files_digest(files, cache_dir), *lines])
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); unpack it again") from None

    def _samples(self, corruption: str, severity: int) -> tuple[Path, list[PublishedSample]]:
        """The path of one severity (array or folder) and its images."""
        if corruption not in self.places:
            found = ", ".join(self.places)
            raise UserError(f"{self.folder}: no {corruption}; found {found}; add its files or leave it out")
        place = self.places[corruption]
        severities = _severities(place) if self.labels is None else list(map(str, SEVERITIES))
        if str(severity) not in severities:
            found = ", ".join(severities)
            raise UserError(f"{place}: no severity {severity}; found {found}; unpack its archive again or leave it out")
        if self.labels is None:
            return place / str(severity), _list_images(place / str(severity))
        each = len(self.labels) // len(SEVERITIES)
        first = (severity - 1) * each
        labels = enumerate(self.labels[first : first + each].tolist())
        return place, [PublishedSample(f"{slot:05d}", label, first + slot) for slot, label in labels]


class PublishedDataset(ShardDataset):
    """Labelled images in order, read from an array or a folder instead of a shard."""

    def __init__(self, path: Path, samples: list[PublishedSample], transform: ImageTransform) -> None:
        index = ShardIndex([str(path.absolute())], [len(samples)], skipped=[], cache_dir="")
        super().__init__(index, transform, order="sequential")
        self.path, self.samples = path, samples

    def load(self, reader: ShardReader, shard: int, sample: int, epoch: int) -> dict[str, Any]:
        found = self.samples[sample]
        where = str(self.path / found.key) if found.row is None else f"{self.path}#{found.row}"
        try:
            if found.row is None:
                with open(where, "rb") as file:
                    image = decode(file.read(MAX_IMAGE_BYTES + 1), self.transform)
            else:
                # Map the file anew for every image (0.1 ms): a mapping that is kept would be copied whole to workers.
                pixels = np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[found.row])
                image = self.transform(Image.fromarray(pixels))
        except ImageError as error:
            raise BadSample("undecodable image", where, str(error)) from None
        except (OSError, ValueError, IndexError) as error:
            raise BadSample("missing image", where, getattr(error, "strerror", None) or one_line(error)) from None
        return {"key": found.key, "label": found.label, "image": image}


def _read_array(path: Path, types: str, shape: tuple[int, ...], expected: str) -> np.ndarray:
    """Maps an array (5 n, *shape) with a dtype in ``types``; reads only the header. Refuses pickles: they run code."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = "an archive of arrays"
        if isinstance(array, np.ndarray):
            parts = array.ndim and len(array) % len(SEVERITIES) == 0
            if parts and array.shape[1:] == shape and array.dtype.char in types:
                return array
            found = f"{array.dtype} {array.shape}"
    except FileNotFoundError:
        found = "missing"
    except Exception as error:  # OSError, ValueError, EOFError, BadZipFile and others, depending on the file
        found = f"cannot be read as an array ({one_line(error)})"
    raise UserError(f"{path}: {found}; expected {expected} or take it out of the folder")


def _read_labels(path: Path) -> np.ndarray:
    """The labels of a CIFAR-C folder, int64 (5 n,): those of severity 1, then of severity 2, ..."""
    expected = "whole numbers (5 * n,) from 0 on, the labels of the images beside it; download it again"
    labels = _read_array(path, np.typecodes["AllInteger"], (), expected)
    if not 0 < len(labels) <= MOST_LABELS:
        raise UserError(f"{path}: {len(labels)} labels; expected {expected}")
    for label in (labels.min(), labels.max()):
        if not 0 <= label < MOST_CLASSES:
            raise UserError(f"{path}: label {label}; expected {expected}")
    return labels.astype(np.int64)


def _severities(place: Path) -> list[str]:
    """The names of the severity folders in the folder of an ImageNet-C corruption."""
    return [str(severity) for severity in SEVERITIES if (place / str(severity)).is_dir()]


def _class_folders(path: Path) -> list[str]:
    names = subfolders(path)
    if not names:
        raise UserError(f"{path}: no class folders; expected <class folder>/*.JPEG; unpack the archive again")
    return names


def _list_images(path: Path) -> list[PublishedSample]:
    """The images by file name. ILSVRC2012_val_... mixes the classes, so the first N images are a fair sample."""
    files = []
    left_out: LeftOut = {}
    for label, folder in enumerate(_class_folders(path)):
        files += [(entry.name, folder, label) for entry in pictures(path / folder, left_out, path)]
    if left_out:
        logger.warning("%s: not taken: %s", path, describe(left_out))
    if not files:
        raise UserError(f"{path}: no images; expected <class folder>/*.JPEG; unpack the archive again")
    return [PublishedSample(f"{folder}/{name}", label) for name, folder, label in sorted(files)]
