"""Texts and labels in words, from Parquet to rows of bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distrobust.data import Shard, describe
from distrobust.data.tokens import to_tokens
from distrobust.errors import DataError
from tests.harness.texts import write_table

TEXTS = ["good", "bad", "so so", "good again"]


def write(
    directory: Path, texts: Any = TEXTS, labels: Any = (1, 0, 2, 1), split: str = "train", **options: Any
) -> Path:
    return write_table(directory / f"{split}.parquet", {"text": texts, "label": labels}, **options)


def read(directory: Path, **options: Any) -> list[bytes]:
    """All rows of the training split, without their padding."""
    shard = Shard(describe(directory, "train", **options), 0, 1, seed=0)
    return [bytes(row.tolist()).rstrip(b"\0") for tokens, _ in shard.in_order(3) for row in tokens]


def test_texts_come_as_the_bytes_of_their_utf8_padded_with_zeros(tmp_path: Path) -> None:
    source = describe(write(tmp_path, ["naïve", "ab", "c", "d"]), "train", length=8)
    assert (source.is_text, source.shape, source.column, source.total_rows, source.num_classes) == (
        True,
        (8,),
        "text",
        4,
        3,
    )
    [(tokens, labels)] = Shard(source, 0, 1, seed=0).in_order(4)
    assert tokens.dtype == torch.uint8
    assert tokens[0].tolist() == [*"naïve".encode(), 0, 0]
    assert labels.tolist() == [1, 0, 2, 1]


def test_long_texts_are_cut_and_empty_ones_are_a_space(tmp_path: Path) -> None:
    assert read(write(tmp_path, ["abcdef", "", "é", "a\0b"]), length=3) == [b"abc", b" ", "é".encode(), b"a b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_kind_of_string_reads_the_same(tmp_path: Path, kind: pa.DataType) -> None:
    assert read(write(tmp_path, pa.array(TEXTS, pa.string()).cast(kind))) == [text.encode() for text in TEXTS]


def test_streaming_and_memory_give_the_same_rows(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(100)]
    source = describe(write(tmp_path, texts, np.arange(100) % 5, row_group_size=7), "train", length=20)
    memory, stream = (Shard(source, 1, 2, seed=3, cache=cache) for cache in ("memory", "stream"))
    for (a, b), (c, d) in zip(memory.batches(1, 10), stream.batches(1, 10), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_images_go_before_texts_and_a_named_column_before_both(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b""}] * 4)
    directory = write_table(
        tmp_path / "train.parquet", {"note": TEXTS, "image": image, "text": TEXTS, "label": [0] * 4}
    )
    assert describe(directory, "train", text_column="note").column == "note"
    with pytest.raises(DataError, match="column 'image', row 0: image does not decode"):
        describe(directory, "train")
    with pytest.raises(DataError, match="image_column is 'image' and text_column 'text'; wanted one of them"):
        describe(directory, "train", image_column="image", text_column="text")


def test_class_names_of_the_metadata_count_for_texts_too(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["bad", "good", "neither", "absent"]}}
    assert describe(write(tmp_path, features=features), "train").class_names == ("bad", "good", "neither", "absent")


def test_labels_in_words_are_numbered_in_their_order_and_alike_in_every_split(tmp_path: Path) -> None:
    train = describe(write(tmp_path, labels=["pos", "neg", "mid", "pos"]), "train")
    assert train.class_names == ("mid", "neg", "pos")
    assert train.labels.tolist() == [2, 1, 0, 2]
    write(tmp_path, ["x", "y"], ["pos", "neg"], split="test")
    assert describe(tmp_path, "test", classes=train.class_names).labels.tolist() == [2, 1]


def test_labels_in_words_are_numbered_over_all_files(tmp_path: Path) -> None:
    write(tmp_path, ["x", "y"], ["b", "c"], split="train-00000-of-00002")
    write(tmp_path, ["z", "w"], ["a", "b"], split="train-00001-of-00002")
    source = describe(tmp_path, "train")
    assert (source.class_names, source.labels.tolist()) == (("a", "b", "c"), [1, 2, 0, 1])


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        describe(directory, "train", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_label_that_is_no_class_is_refused_by_row(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, labels=["a", "b", "x", "x"]), classes=("a", "b"))
    assert "column 'label', row 2: label 'x' is none of the 2 classes (a, b, ...); wanted the classes of the" in text


def test_a_null_text_is_refused_by_row_where_statistics_count_it_and_else_when_read(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, ["a", "b", "c", None], row_group_size=2))
    assert "train.parquet, column 'text', row 3: text is null, wanted a string (an empty one is allowed)" in text
    with pytest.raises(DataError, match="row 1: text is null"):
        to_tokens([b"a", None], 4, lambda i: f"row {i}")


def test_a_null_label_in_words_is_refused_by_row(tmp_path: Path) -> None:
    assert "row 1: label is null, wanted an integer or a string" in refusal(
        write(tmp_path, labels=["a", None, "b", "a"])
    )


def test_a_text_column_of_another_type_is_refused(tmp_path: Path) -> None:
    assert "column 'text': got int64, wanted texts as string; choose another column with text_column" in refusal(
        write(tmp_path, [1, 2, 3, 4])
    )
    assert "has no column 'review', which text_column asks for: its columns are text" in refusal(
        write(tmp_path), text_column="review"
    )
