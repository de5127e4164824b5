"""scikit-learn's digits in the layout of every other data set: the real data the demonstration trains on.

1,797 handwritten digits, 8x8 gray, values 0 .. 16 (E. Alpaydin, C. Kaynak, UCI repository, 1998); they come
inside the scikit-learn package, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distrobust.data.write import write_parquet
from distrobust.errors import DataError

TRAIN_FRACTION = 0.8
ROW_GROUP_SIZE = 128  # small, so that also this data set has several row groups to share out
MAX_VALUE = 16


def write_digits(directory: str | Path, seed: int = 0) -> Path:
    """Writes train.parquet (1,437 rows) and test.parquet (360) into `directory`, made if missing; returns it.

    Values are scaled to 0 .. 255. The rows are shuffled by `seed`: the same seed gives the same files.
    Raises DataError when scikit-learn is missing or the directory cannot be written.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; try `pip install distrobust[demo]`"
        ) from error
    digits = load_digits()
    images = np.round(digits.images * (255 / MAX_VALUE)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    num_train = int(len(labels) * TRAIN_FRACTION)
    names = [str(digit) for digit in digits.target_names]
    root = Path(directory)
    for split, rows in (("train", order[:num_train]), ("test", order[num_train:])):
        write_parquet(root / f"{split}.parquet", images[rows], labels[rows], names, ROW_GROUP_SIZE)
    return root
