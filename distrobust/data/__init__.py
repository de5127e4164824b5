"""Images or texts, and labels, from Parquet, shared out over ranks, augmented by the batch.

describe      a directory and a split -> Source: files, classes, shape, checked labels
columns       a directory and a split -> the names of its columns
split_held_out  Source -> the rows to train on and the rows to validate on
read_groups   Source, column -> whose each row is
Shard         Source, rank, world size -> batches of uint8 images, or bytes of text, and int64 labels
crop_and_flip   augmentation of a whole batch
write_digits, write_parquet   make data sets in the same layout
"""

from distrobust.data.augment import crop_and_flip
from distrobust.data.decoding import decode
from distrobust.data.digits import write_digits
from distrobust.data.groups import read_groups
from distrobust.data.parquet import columns, describe
from distrobust.data.selection import Selection, split_held_out
from distrobust.data.shard import Shard
from distrobust.data.source import RowGroup, Source
from distrobust.data.write import write_parquet

__all__ = [
    "RowGroup",
    "Selection",
    "Shard",
    "Source",
    "columns",
    "crop_and_flip",
    "decode",
    "describe",
    "read_groups",
    "split_held_out",
    "write_digits",
    "write_parquet",
]
