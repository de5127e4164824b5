"""The digits as a data set like any other."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from distrobust.data import Shard, describe, write_digits
from distrobust.errors import DataError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn", reason="scikit-learn, which holds the digits, is not installed")
    return write_digits(tmp_path_factory.mktemp("digits") / "made", seed=0)


def test_digits_have_the_hugging_face_layout(digits):
    schema = pq.read_schema(digits / "train.parquet")
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(schema.field("label").type) == "int64"
    source = describe(digits, "train")
    assert source.class_names == tuple("0123456789")
    assert source.shape == (1, 8, 8)
    assert source.total_rows == 1437
    assert {group.num_rows for group in source.row_groups[:-1]} == {128}
    assert sorted(file.name for file in digits.iterdir()) == ["test.parquet", "train.parquet"]


def test_digits_of_both_splits_are_all_the_digits_scaled(digits):
    from sklearn.datasets import load_digits

    written = []
    for split in ("train", "test"):
        for images, labels in Shard(describe(digits, split), 0, 1, seed=0).in_order(500):
            written += [(image.tobytes(), int(label)) for image, label in zip(images.numpy(), labels, strict=True)]
    original = load_digits()
    scaled = np.round(original.images * 255 / 16).astype(np.uint8)
    assert (scaled.min(), scaled.max()) == (0, 255)
    expected = [(image.tobytes(), int(label)) for image, label in zip(scaled, original.target, strict=True)]
    assert sorted(written) == sorted(expected)


def test_the_seed_decides_the_files(digits, tmp_path):
    same, other = write_digits(tmp_path / "same", seed=0), write_digits(tmp_path / "other", seed=1)
    for split in ("train.parquet", "test.parquet"):
        assert (same / split).read_bytes() == (digits / split).read_bytes()
    assert describe(other, "train").labels.tolist() != describe(digits, "train").labels.tolist()


def test_missing_scikit_learn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn, which is not installed; try `pip install distrobust\[demo\]`"):
        write_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_data_room_does_not_import_scikit_learn():
    import subprocess

    code = "import sys, distrobust.data; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
