"""Images to classify, as bytes in memory: CIFAR-10's python archive, a folder of pictures, or scikit-learn's digits."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}
TEST_SHARE = 0.2
CROP_MARGIN = 4


@dataclass(frozen=True)
class Images:
    """A data set; the pictures are ``(N, C, H, W)`` in uint8, the labels ``(N,)`` in int64."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    mean: Tensor = field(init=False)
    deviation: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Find mean and standard deviation of the training pictures, for each colour."""
        # By counting the 256 values: nothing the size of the data in floating point.
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack(
            [torch.bincount(self.train_x[:, c].flatten(), minlength=256) for c in range(self.channels)]
        )
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        deviation = (share @ values.square() - mean.square()).clamp_min(1e-6).sqrt()
        object.__setattr__(self, "mean", mean.float()[:, None, None])
        object.__setattr__(self, "deviation", deviation.float()[:, None, None])

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train_x.shape[1]

    def prepared(self, pictures: Tensor, device: torch.device) -> Tensor:
        """Bytes as a channels_last batch of mean 0 and deviation 1."""
        batch = pictures.to(device).float().sub(self.mean.to(device)).div(self.deviation.to(device))
        return batch.contiguous(memory_format=torch.channels_last)


def load(path: Path | None, size: int | None, seed: int) -> Images:
    """The data set at a path; scikit-learn's digits where there is none.

    Args:
        path: of ``cifar-10-python.tar.gz``, of the folder that comes out of it, or of a folder with one subfolder of
            pictures for each class, perhaps below ``train`` and ``test`` (or ``val``).
        size: of the square pictures; None for 8 with the digits and 32 otherwise.
        seed: of the split into training and test part, where the data brings none.
    """
    if path is None:
        return digits(8 if size is None else size, seed)
    if not path.exists():
        raise FileNotFoundError(f"data: there is no {path}")
    if path.is_file() or (files := list(path.rglob("data_batch_1"))):
        return cifar10(path if path.is_file() else files[0].parent, 32 if size is None else size)
    return folder(path, 32 if size is None else size, seed)


def digits(size: int, seed: int) -> Images:
    """scikit-learn's handwritten digits: 1797 grey pictures of 8x8, enlarged to ``size``."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.tensor(data.images / 16 * 255, dtype=torch.float32)[:, None]
    return _split("digits", _resized(pictures, size), torch.tensor(data.target), seed, tuple("0123456789"))


def cifar10(path: Path, size: int) -> Images:
    """CIFAR-10 from the archive that its authors offer for Python, or from the folder that it contains."""
    batches = {name: _Unpickler(io.BytesIO(content), encoding="bytes").load() for name, content in _cifar_files(path)}
    train = [batches[f"data_batch_{number}"] for number in range(1, 6) if f"data_batch_{number}" in batches]
    if not train or "test_batch" not in batches:
        raise ValueError(f"data: {path} has no data_batch_1 and test_batch, so it is not CIFAR-10's python archive")

    def pictures(parts: list[dict[bytes, Any]]) -> Tensor:
        values = torch.cat([torch.as_tensor(part[b"data"]) for part in parts]).view(-1, 3, 32, 32)
        return values if size == 32 else _resized(values.float(), size)

    def labels(parts: list[dict[bytes, Any]]) -> Tensor:
        return torch.tensor([label for part in parts for label in part[b"labels"]])

    test = [batches["test_batch"]]
    return Images("CIFAR-10", pictures(train), labels(train), pictures(test), labels(test), CIFAR_CLASSES)


def _cifar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and "_batch" in member.name:
                    yield Path(member.name).name, file.read()
    else:
        for file_path in sorted(path.glob("*_batch*")):
            yield file_path.name, file_path.read_bytes()


class _Unpickler(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle from elsewhere could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if not is_array and (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"data: expected arrays, got {module}.{name}")
        return super().find_class(module, name)


def folder(path: Path, size: int, seed: int) -> Images:
    """Pictures in one subfolder for each class, cropped to squares and resized; Pillow reads them."""
    train_path = path / "train"
    test_path = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if not train_path.is_dir() or test_path is None:
        classes = _classes(path)
        return _split(path.name, *_read_folder(path, classes, size), seed, classes)
    classes = _classes(train_path)
    return Images(path.name, *_read_folder(train_path, classes, size), *_read_folder(test_path, classes, size), classes)


def _classes(path: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
    if len(names) < 2:
        raise ValueError(f"data: expected a subfolder of pictures for each class in {path}, got {list(names)}")
    return names


def _read_folder(path: Path, classes: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    import numpy
    from PIL import Image, ImageOps

    pictures, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((path / name).rglob("*")):
            if file.suffix.lower() in PICTURES:
                with Image.open(file) as picture:
                    square = ImageOps.fit(picture.convert("RGB"), (size, size))
                pictures.append(torch.from_numpy(numpy.array(square)).permute(2, 0, 1))
                labels.append(label)
    if not pictures:
        raise ValueError(f"data: found no picture in the subfolders of {path}")
    return torch.stack(pictures), torch.tensor(labels)


def _resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures of values from 0 to 255, in floating point, as bytes of another size."""
    if pictures.shape[-1] != size:
        pictures = F.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True)
    return pictures.round().clamp(0, 255).to(torch.uint8)


def _split(name: str, x: Tensor, y: Tensor, seed: int, classes: tuple[str, ...]) -> Images:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([round(TEST_SHARE * len(y)), len(y) - round(TEST_SHARE * len(y))])
    return Images(name, x[train], y[train], x[test], y[test], classes)


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to 4 pixels, its border black, and mirrored or not."""
    count, _, height, width = pictures.shape
    shifts = torch.randint(2 * CROP_MARGIN + 1, (2, count, 1), generator=generator)
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(pictures, [CROP_MARGIN] * 4)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
