"""Which files hold a split: `<split>.parquet`, or the shards the Hugging Face hub serves.

Tried in this order, the first that exists wins:

    DIR/train.parquet
    DIR/train-00000-of-00002.parquet, DIR/train-00001-of-00002.parquet     (all of them, in name order)
    DIR/data/train.parquet
    DIR/data/train-00000-of-00002.parquet, ...
"""

from __future__ import annotations

import re
from pathlib import Path

from distrobust.errors import DataError

MAX_FILES_NAMED = 5  # in an error message, which is one line


def find_files(directory: str | Path, split: str) -> tuple[Path, ...]:
    """The Parquet files of `split` ("train", "test", ...) below `directory`, in the order their rows count.

    Raises DataError when the directory or the split is missing, or when a shard of the split is.
    """
    root = Path(directory)
    if root.is_file():
        raise DataError(f"data path {root} is a file, wanted the directory that holds {split}.parquet")
    if not root.is_dir():
        raise DataError(
            f"data directory {root} does not exist, wanted a directory that holds {split}.parquet; "
            "check the path, or write an example there with `distrobust data digits DIR`"
        )
    for folder in (root, root / "data"):
        single = folder / f"{split}.parquet"
        if single.is_file():
            return (single,)
        shards = _shards(folder, split)
        if shards:
            return shards
    raise DataError(
        f"no split {split!r} in {root}, which holds {_names_of_parquet_files(root)}; wanted {split}.parquet "
        f"or {split}-00000-of-00001.parquet there or under data/; point the path at the folder that has them"
    )


def _shards(folder: Path, split: str) -> tuple[Path, ...]:
    """`<split>-00000-of-00003[-hash].parquet` in `folder`, all or (); DataError when only some are there."""
    pattern = re.compile(re.escape(split) + r"-(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")
    files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
    matches = [(file, match) for file in files if (match := pattern.fullmatch(file.name))]
    if not matches:
        return ()
    totals = sorted({int(match[2]) for _, match in matches})
    present = sorted(int(match[1]) for _, match in matches)
    if len(totals) > 1:
        raise DataError(
            f"{folder} mixes {split} shards of {totals[0]} and of {totals[-1]}; wanted one set: remove the older files"
        )
    if present != list(range(totals[0])):
        missing = [i for i in range(totals[0]) if i not in present]
        got = f"shard {missing[0]} is missing" if missing else "a shard is there twice"
        raise DataError(
            f"{split} in {folder} is {totals[0]} shards, but {got} ({len(matches)} files found); "
            "download the split again"
        )
    return tuple(file for file, _ in matches)


def _names_of_parquet_files(root: Path) -> str:
    names = sorted(str(file.relative_to(root)) for depth in ("*", "*/*") for file in root.glob(f"{depth}.parquet"))
    if not names:
        return "no Parquet files"
    more = f" and {len(names) - MAX_FILES_NAMED} more" if len(names) > MAX_FILES_NAMED else ""
    return ", ".join(names[:MAX_FILES_NAMED]) + more
