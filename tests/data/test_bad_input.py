"""Every data set describe() refuses, by the line it answers with: what, where, got, wanted, what to try."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest

from distrobust.data import describe
from distrobust.errors import DataError


def refusal(directory, split="train", **options) -> str:
    """The text of the DataError that describe() must raise; always a single line."""
    with pytest.raises(DataError) as caught:
        describe(directory, split, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_directory_is_named(tmp_path):
    text = refusal(tmp_path / "nowhere")
    assert re.search(r"nowhere does not exist, wanted a directory that holds train.parquet.*distrobust data", text)


def test_a_file_in_place_of_the_directory_is_named(write_table):
    assert "is a file, wanted the directory" in refusal(write_table() / "train.parquet")


def test_missing_split_lists_the_files_that_exist(write_table):
    write_table(name="plain/test-00000-of-00001.parquet")
    text = refusal(write_table(), "validation")
    assert "no split 'validation'" in text
    assert "holds plain/test-00000-of-00001.parquet, train.parquet; wanted validation.parquet" in text


def test_a_split_missing_from_an_empty_directory_says_so(tmp_path):
    assert "which holds no Parquet files" in refusal(tmp_path)


def test_a_long_listing_is_cut(tmp_path, write_table):
    for i in range(8):
        write_table(name=f"part{i}.parquet")
    assert "part4.parquet and 3 more; wanted" in refusal(tmp_path)


def test_missing_shard_is_numbered(write_table):
    write_table(name="train-00000-of-00003.parquet")
    text = refusal(write_table(name="train-00002-of-00003.parquet"))
    assert "is 3 shards, but shard 1 is missing (2 files found); download" in text


def test_a_shard_that_is_there_twice_is_refused(write_table):
    write_table(name="train-00000-of-00001-abc.parquet")
    assert "a shard is there twice" in refusal(write_table(name="train-00000-of-00001-def.parquet"))


def test_shards_of_two_versions_are_refused(write_table):
    write_table(name="train-00000-of-00001.parquet")
    assert "mixes train shards of 1 and of 2" in refusal(write_table(name="train-00000-of-00002.parquet"))


@pytest.mark.parametrize("content", [b"", b"label,image\n0,x\n", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    assert "train.parquet is not a readable Parquet file (" in refusal(tmp_path)


def test_a_file_cut_short_is_refused(write_table):
    file = write_table() / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert "is not a readable Parquet file" in refusal(file.parent)


def test_missing_image_column_lists_the_columns_there_are(write_table):
    text = refusal(write_table(image_type=None))
    assert "has no image column: its columns are label (int64); wanted `image` or `img` of type struct<" in text
    assert "image_column" in text


def test_two_image_columns_ask_for_a_choice(write_table):
    directory = write_table(image_column="left", extra={"right": pa.array([{"bytes": b""}] * 3)})
    assert "has 2 image columns: left, right; choose one with image_column" in refusal(directory)


def test_an_image_column_of_another_type_is_refused(write_table):
    text = refusal(write_table(images=["a.png"] * 3, image_type=pa.string()))
    assert "column 'image': got string, wanted encoded images as struct<bytes: binary, path: string>" in text


def test_missing_label_column_lists_the_columns_there_are(write_table):
    text = refusal(write_table(label_column="id"))
    assert re.search(r"has no label column: its columns are image \(struct.*\), id \(int64\); wanted `label`", text)
    assert "label_column" in text


@pytest.mark.parametrize("role", ["image", "label"])
def test_a_chosen_column_that_does_not_exist_is_refused(write_table, role):
    text = refusal(write_table(), **{f"{role}_column": "absent"})
    assert f"has no column 'absent', which {role}_column asks for: its columns are image (struct" in text


def test_no_rows_are_refused(write_table):
    assert "train.parquet has no rows, wanted at least one image" in refusal(
        write_table(labels=[], label_type=pa.int64())
    )


@pytest.mark.parametrize(("labels", "kind"), [([0.0, 1.0], "double"), ([True, False], "bool")])
def test_labels_that_are_not_integers_are_refused(write_table, labels, kind):
    assert f"column 'label': labels are {kind}, wanted integers 0 .." in refusal(write_table(labels=labels))


def test_a_null_label_is_refused_by_row(write_table):
    assert "column 'label', row 1: label is null, wanted an integer" in refusal(write_table(labels=[0, None, 1]))


def test_a_label_beyond_int64_is_refused(write_table):
    text = refusal(write_table(labels=[0, 2**64 - 1], label_type=pa.uint64()))
    assert "column 'label': cannot be read (" in text


@pytest.mark.parametrize("label", [2, -3])
def test_a_label_outside_the_classes_is_refused_by_row(write_table, label):
    text = refusal(write_table(labels=[0, 1, label, label], class_names=["cat", "dog"]))
    assert f"column 'label', row 2: label {label} is outside the 2 classes, wanted 0 .. 1 (2 such rows)" in text


def test_a_split_without_labels_is_recognised_by_its_minus_ones(write_table):
    assert "-1 usually marks a split published without labels" in refusal(write_table(labels=[-1, -1]))


@pytest.mark.parametrize("row", [0, 1])
def test_rows_are_counted_within_the_file_that_is_named(write_table, row):
    write_table(name="train-00000-of-00002.parquet", class_names=["a", "b", "c"])
    text = refusal(write_table(labels=[[7, 0], [0, 7]][row], name="train-00001-of-00002.parquet"))
    assert f"train-00001-of-00002.parquet, column 'label', row {row}: label 7" in text


def test_absurd_labels_without_class_names_are_refused(write_table):
    assert "row 1: label 1000000000, but the file names no classes" in refusal(write_table(labels=[0, 10**9]))


def test_files_that_disagree_about_the_classes_are_refused(write_table):
    write_table(name="train-00000-of-00002.parquet", class_names=["a", "b", "c"])
    text = refusal(write_table(name="train-00001-of-00002.parquet", class_names=["a", "c", "b"]))
    assert "the classes are a, c, b, but elsewhere a, b, c; wanted the same classes in the same order" in text


def test_a_test_split_with_other_classes_than_the_training_split_is_refused(write_table):
    text = refusal(write_table(class_names=["a", "b", "c"]), classes=("a", "b", "c", "d"))
    assert "the classes are a, b, c, but elsewhere a, b, c ... (4 classes)" in text


def test_a_later_file_without_the_columns_is_refused(write_table):
    write_table(name="train-00000-of-00002.parquet")
    text = refusal(write_table(name="train-00001-of-00002.parquet", label_column="other"))
    assert "train-00001-of-00002.parquet has no column 'label'" in text


def test_metadata_that_is_not_json_is_refused(write_table):
    assert "schema metadata key `huggingface` is not JSON (" in refusal(write_table(metadata="{info"))


def test_a_first_image_that_does_not_decode_is_refused(write_table):
    text = refusal(write_table(images=[b"not an image", b"", b""]))
    assert "column 'image', row 0: image does not decode (not an image format Pillow knows; 12 bytes)" in text


@pytest.mark.parametrize("statistics", [True, False])
def test_a_null_first_image_is_refused(write_table, png, statistics):
    text = refusal(write_table(images=[None, png(), png()], write_statistics=statistics))
    assert "column 'image', row 0: image is null, wanted encoded bytes; embed the images" in text


def test_a_later_null_image_is_refused_by_row_where_statistics_count_it(write_table, png):
    images = [png(), png(), png(), None]
    text = refusal(write_table(images, labels=[0, 1, 2, 3], row_group_size=2))
    assert "train.parquet, column 'image', row 3: image is null" in text


def test_a_null_struct_is_a_null_image(write_table, png):
    images = pa.array([{"bytes": png()}, None, {"bytes": png()}])
    directory = write_table(image_type=None, extra={"image": images})
    assert "train.parquet, column 'image', row 1: image is null" in refusal(directory)


def test_a_number_of_channels_other_than_one_or_three_is_refused(write_table):
    assert "channels is 4, wanted 1 (gray), 3 (RGB)" in refusal(write_table(), channels=4)
