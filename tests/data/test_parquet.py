"""What describe() finds in a data set that is fine."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from distrobust.data import describe, write_parquet


def test_describe_finds_columns_classes_shape_and_labels(tmp_path, write_numbered):
    source = describe(write_numbered(tmp_path, 10, 4), "train")
    assert (source.column, source.label_column) == ("image", "label")
    assert source.class_names == tuple(f"class {i}" for i in range(5))
    assert source.shape == (3, 2, 3)
    assert (source.total_rows, source.num_classes, source.row_bytes) == (10, 5, 18)
    assert [(group.first_row, group.num_rows) for group in source.row_groups] == [(0, 4), (4, 4), (8, 2)]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [row % 5 for row in range(10)]


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("suffix", ["", "-0123456789abcdef"])
def test_hub_shards_are_concatenated_in_name_order(tmp_path, write_numbered, folder, suffix):
    for shard in (2, 0, 1):  # not the order they are written in
        name = f"train-{shard:05d}-of-00003{suffix}.parquet"
        write_numbered(tmp_path / folder, 4, 3, name, first=4 * shard)
    source = describe(tmp_path, "train")
    assert [file.name[:11] for file in source.files] == ["train-00000", "train-00001", "train-00002"]
    assert source.labels.tolist() == [row % 5 for row in range(12)]
    assert [group.first_row for group in source.row_groups] == [0, 3, 4, 7, 8, 11]


def test_a_single_file_goes_before_shards_and_the_data_folder(tmp_path, write_numbered):
    write_numbered(tmp_path, 3, 3)
    write_numbered(tmp_path, 4, 3, "train-00000-of-00001.parquet")
    write_numbered(tmp_path / "data", 5, 3)
    assert describe(tmp_path, "train").total_rows == 3


def test_splits_do_not_mix(tmp_path, write_numbered):
    write_numbered(tmp_path, 3, 3)
    write_numbered(tmp_path, 4, 3, "test.parquet")
    assert (describe(tmp_path, "train").total_rows, describe(tmp_path, "test").total_rows) == (3, 4)


def test_empty_files_and_row_groups_among_others_are_skipped(tmp_path, write_numbered):
    write_numbered(tmp_path, 0, 3, "train-00000-of-00002.parquet")
    write_numbered(tmp_path, 4, 3, "train-00001-of-00002.parquet")
    source = describe(tmp_path, "train")
    assert source.total_rows == 4
    assert source.where(3).endswith("train-00001-of-00002.parquet, column 'image', row 3")


@pytest.mark.parametrize("name", ["image", "img", "photo"])
def test_the_image_column_is_found_under_its_usual_names_or_by_its_type(write_table, name):
    assert describe(write_table(image_column=name), "train").column == name


def test_a_named_image_column_goes_before_others_of_its_type(write_table):
    other = pa.array([{"bytes": b"mask"}] * 3)
    assert describe(write_table(extra={"mask": other}), "train").column == "image"


@pytest.mark.parametrize("name", ["label", "labels", "fine_label"])
def test_the_label_column_is_found_under_its_usual_names(write_table, name):
    assert describe(write_table(label_column=name), "train").label_column == name


def test_a_column_the_metadata_calls_a_class_label_is_the_label(write_table):
    source = describe(write_table(label_column="species", class_names=["a", "b", "c"]), "train")
    assert (source.label_column, source.class_names) == ("species", ("a", "b", "c"))


def test_columns_can_be_chosen(write_table, png):
    extra = {"mask": pa.array([{"bytes": png(mode="L")}] * 3), "coarse": pa.array([0, 0, 1])}
    source = describe(write_table(extra=extra), "train", image_column="mask", label_column="coarse")
    assert (source.shape, source.labels.tolist()) == ((1, 2, 3), [0, 0, 1])


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int32(), pa.uint64()])
def test_labels_of_any_integer_type_become_int64(write_table, kind):
    source = describe(write_table(label_type=kind), "train")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 2]


def test_large_binary_images_are_read(write_table):
    kind = pa.struct([("bytes", pa.large_binary())])
    assert describe(write_table(image_type=kind), "train").shape == (3, 2, 3)


@pytest.mark.parametrize("metadata", [None, "{}", '{"info": null}', '{"info": {"features": {"label": {}}}}'])
def test_without_class_names_classes_are_numbered_up_to_the_largest_label(write_table, metadata):
    source = describe(write_table(labels=[0, 3, 1], metadata=metadata), "train")
    assert source.class_names == ("0", "1", "2", "3")


def test_a_test_split_without_names_takes_the_classes_of_the_training_split(write_table):
    write_table(labels=[0, 1], name="test.parquet")
    assert describe(write_table(), "test", classes=("a", "b", "c")).class_names == ("a", "b", "c")


def test_gray_images_stay_one_channel_unless_three_are_asked_for(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4)
    write_parquet(tmp_path / "train.parquet", images, np.array([0, 1]), ["a", "b"])
    assert describe(tmp_path, "train").shape == (1, 3, 4)
    assert describe(tmp_path, "train", channels=3).shape == (3, 3, 4)


def test_describe_decodes_one_image_only(write_table, png, monkeypatch):
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda data: opened.append(data) or open_image(data))
    describe(write_table(images=[png(), b"damaged", b"damaged"]), "train")
    assert len(opened) == 1
