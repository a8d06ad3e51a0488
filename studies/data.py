"""The data sets: scikit-learn's digits, breast cancer and wine, and the Pima diabetes data; their splits, their noise.

What is learned from the data before the training (what to put in place of a missing value, mean and deviation of each
feature) is learned from the training part alone.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NAMES = ("digits", "breast cancer", "wine", "Pima")
TEST_SHARE = 0.2
LABEL_NOISE = 0.1
"""The share of the training part's labels that a noisy version replaces by another class."""
FEATURE_NOISE = 0.5
"""The standard deviation of a noisy version's Gaussian noise, where that of each feature is 1."""

PIMA_MISSING = ("glucose", "blood_pressure", "skin_thickness", "insulin", "bmi")
"""The features of the Pima data in which 0 means "not measured"."""
PIMA_FEATURES = (
    "pregnancies",
    "glucose",
    "blood_pressure",
    "skin_thickness",
    "insulin",
    "bmi",
    "pedigree",
    "age",
)


@dataclass(frozen=True)
class Dataset:
    """A data set as it comes.

    Attributes:
        name: one of :data:`NAMES`.
        x: ``(N, features)`` in float64; NaN for what was not measured.
        y: ``(N,)`` in int64, classes from 0 on.
    """

    name: str
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.int64]

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.y.max()) + 1


@dataclass(frozen=True)
class Parts:
    """A training part and a test part, ready for a network: ``(N, features)`` in float32 and ``(N,)`` in int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def features(self) -> int:
        """The width of the input."""
        return self.train_x.shape[1]


def load(name: str, pima: Path | None = None) -> Dataset:
    """A data set by its name.

    Args:
        name: one of :data:`NAMES`.
        pima: the CSV file of the Pima data: a header, then :data:`PIMA_FEATURES` in this order and the outcome, 0 or 1.
            None fetches it from OpenML (``diabetes``, version 1) and keeps it in scikit-learn's own folder.

    Raises:
        ValueError: for another name, and for a file with other columns, no samples, or what is not a number.
        OSError: when the file ``pima`` cannot be read, or OpenML cannot be reached.
    """
    from sklearn import datasets

    if name == "Pima":
        return pima_diabetes(pima)
    loaders = {"digits": datasets.load_digits, "breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}
    if name not in loaders:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    data = loaders[name]()
    return Dataset(name, data.data.astype(np.float64), data.target.astype(np.int64))


def pima_diabetes(path: Path | None) -> Dataset:
    """The Pima Indians Diabetes data (Smith et al. 1988): 768 women, 8 features, 268 with diabetes."""
    if path is None:
        from sklearn.datasets import fetch_openml

        try:
            data = fetch_openml("diabetes", version=1, as_frame=False, parser="liac-arff")
        except OSError as error:
            raise OSError(f"data: OpenML cannot be reached ({error}); name a CSV file with --data") from error
        x, y = np.asarray(data.data, np.float64), (data.target == "tested_positive").astype(np.int64)
    else:
        x, y = _pima_file(path)
    columns = [PIMA_FEATURES.index(feature) for feature in PIMA_MISSING]
    x[:, columns] = np.where(x[:, columns] == 0, np.nan, x[:, columns])
    return Dataset("Pima", x, y)


def _pima_file(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    try:
        header, *lines = path.read_text().splitlines() or [""]
        if tuple(header.split(",")[:-1]) != PIMA_FEATURES:
            raise ValueError(f"expected the columns {', '.join(PIMA_FEATURES)} and the outcome, got {header[:200]!r}")
        if not lines:
            raise ValueError("expected a line for each sample, got none")
        values = np.loadtxt(lines, delimiter=",", ndmin=2)
        if values.shape[1] != len(PIMA_FEATURES) + 1:
            raise ValueError(f"expected {len(PIMA_FEATURES) + 1} numbers a line, got {values.shape[1]}")
        if set(np.unique(values[:, -1])) != {0, 1}:
            raise ValueError(f"expected the outcomes 0 and 1, got {np.unique(values[:, -1])[:10].tolist()}")
    except ValueError as error:
        raise ValueError(f"data: {path}: {error}") from error
    return values[:, :-1].copy(), values[:, -1].astype(np.int64)


def test_indices(dataset: Dataset, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The rows of the training part and those of the test part, with the same shares of the classes in both."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(dataset.y)), test_size=TEST_SHARE, random_state=seed, stratify=dataset.y
    )
    return train, test


def fewer(rows: npt.NDArray[np.intp], y: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.intp]:
    """A stratified choice of a fraction of the rows, at least two of each class."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number above 0 and at most 1, got {fraction}")
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(y):
        members = generator.permutation(rows[y[rows] == label])
        chosen.append(members[: max(2, round(fraction * len(members)))])
    return np.sort(np.concatenate(chosen))


def preprocessing() -> Any:
    """What is fitted on the training part: the median in place of a missing value, then mean 0 and deviation 1."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())


def split(dataset: Dataset, seed: int, fraction: float = 1.0, noisy: bool = False) -> Parts:
    """A training and a test part, preprocessed by what the training part says.

    Args:
        dataset: from :func:`load`.
        seed: of the split, of the choice of a fraction, and of the noise. The test part depends on nothing else.
        fraction: of the training part that is kept.
        noisy: whether features of both parts get Gaussian noise (:data:`FEATURE_NOISE`) and training labels are
            replaced (:data:`LABEL_NOISE`).
    """
    train, test = test_indices(dataset, seed)
    if fraction < 1:
        train = fewer(train, dataset.y, fraction, seed)
    prepare = preprocessing().fit(dataset.x[train])
    train_x, test_x = prepare.transform(dataset.x[train]), prepare.transform(dataset.x[test])
    train_y, test_y = dataset.y[train], dataset.y[test]
    if noisy:
        generator = np.random.default_rng(seed)
        train_x = train_x + FEATURE_NOISE * generator.standard_normal(train_x.shape)
        test_x = test_x + FEATURE_NOISE * generator.standard_normal(test_x.shape)
        wrong = generator.random(len(train_y)) < LABEL_NOISE
        shift = generator.integers(1, dataset.classes, len(train_y))
        train_y = np.where(wrong, (train_y + shift) % dataset.classes, train_y)
    return as_parts(train_x, train_y, test_x, test_y, dataset.classes)


def mnist(folder: Path) -> Parts:
    """MNIST with its own test part; mean and deviation of all pixels of the training part make the scale.

    Args:
        folder: with the four idx files, ``train-images-idx3-ubyte`` and so on, packed by gzip or not.

    Raises:
        FileNotFoundError: when one of them is not there.
        ValueError: when one of them is not an idx file of bytes.
    """
    train_x, test_x = (idx(folder, f"{part}-images-idx3-ubyte").astype(np.float32) for part in ("train", "t10k"))
    train_y, test_y = (idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    mean, deviation = train_x.mean(), train_x.std()
    scaled = [((x - mean) / deviation).reshape(len(x), -1) for x in (train_x, test_x)]
    return as_parts(scaled[0], train_y, scaled[1], test_y, int(train_y.max()) + 1)


def idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """An idx file of bytes: two zeros, 8, the number of dimensions, each size as four bytes, and the values."""
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"data: {folder / name} is not an idx file of bytes; it begins with {content[:3]!r}")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def as_parts(train_x: Any, train_y: Any, test_x: Any, test_y: Any, classes: int) -> Parts:
    """Arrays as tensors."""
    return Parts(
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y, dtype=torch.int64),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y, dtype=torch.int64),
        classes,
    )
