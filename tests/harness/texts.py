"""A data set of texts small enough to learn in a second: two words of three give the class away."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = {
    "home": ["garden", "dinner", "kitchen", "family"],
    "spam": ["prize", "winner", "cheap", "urgent"],
    "work": ["meeting", "report", "budget", "deadline"],
}
OTHERS = ["the", "a", "of", "and", "it", "was", "for", "on"]
LENGTH = 32  # bytes; no text is longer


def write_table(path: Path, columns: dict[str, object], row_group_size: int = 50, features: object = None) -> Path:
    """One file; features: of the Hugging Face metadata. Returns its directory."""
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path.parent


def write_texts(directory: Path, num_train: int = 320, num_test: int = 100) -> Path:
    """train.parquet and test.parquet with columns `text` and `label`, both strings."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", num_train), ("test", num_test)):
        labels = [str(label) for label in rng.choice(list(WORDS), rows)]
        texts = []
        for label in labels:
            words = [*rng.choice(OTHERS, 1), *rng.choice(WORDS[label], 2)]
            texts.append(" ".join(str(word) for word in rng.permutation(words)))
        write_table(directory / f"{split}.parquet", {"text": texts, "label": labels})
    return directory
