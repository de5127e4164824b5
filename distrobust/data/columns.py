"""Which column is the image or the text, which the label, and what the classes are called.

The Hugging Face layout: an image is struct<bytes: binary, path: string>, a label an integer, and the
schema metadata key `huggingface` holds JSON whose `info.features.<label>` is
`{"_type": "ClassLabel", "names": [...]}`. A text is a string; a label may be a string too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from distrobust.errors import DataError

IMAGE_COLUMNS = ("image", "img")
TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMNS = ("label", "labels", "fine_label")  # CIFAR-100 has fine_label and coarse_label


def choose_column(schema: pa.Schema, file: Path, image: str | None, text: str | None) -> tuple[str, bool]:
    """(name, whether it is text). `image` or `text` name it; else images go before `text` or `sentence`.

    Raises DataError when both are named, and as the two below do.
    """
    if image is not None and text is not None:
        raise DataError(f"image_column is {image!r} and text_column {text!r}; wanted one of them: leave the other out")
    has_images = any(name in schema.names for name in IMAGE_COLUMNS) or any(_holds_images(f.type) for f in schema)
    found = next((name for name in TEXT_COLUMNS if name in schema.names), None)
    if text is None and image is None and not has_images:
        text = found
    if text is None:
        return choose_image_column(schema, file, image), False
    _require_column(schema, file, text, "text")
    if not holds_strings(schema.field(text).type):
        raise DataError(
            f"{file}, column {text!r}: got {schema.field(text).type}, wanted texts as string; "
            "choose another column with text_column"
        )
    return text, True


def choose_image_column(schema: pa.Schema, file: Path, wanted: str | None = None) -> str:
    """`wanted`, else `image` or `img`, else the only struct column with a binary field `bytes`.

    Raises DataError when there is none, more than one, or one that does not hold encoded images.
    """
    if wanted is not None:
        _require_column(schema, file, wanted, "image")
        name = wanted
    else:
        named = [name for name in IMAGE_COLUMNS if name in schema.names]
        candidates = named or [field.name for field in schema if _holds_images(field.type)]
        if not candidates:
            raise DataError(
                f"{file} has no image column: its columns are {_columns(schema)}; wanted `image` or `img` "
                "of type struct<bytes: binary, path: string>; name another one with image_column, or one of text with "
                "text_column"
            )
        if not named and len(candidates) > 1:
            raise DataError(
                f"{file} has {len(candidates)} image columns: {', '.join(candidates)}; choose one with image_column"
            )
        name = candidates[0]
    if not _holds_images(schema.field(name).type):
        raise DataError(
            f"{file}, column {name!r}: got {schema.field(name).type}, wanted encoded images as "
            "struct<bytes: binary, path: string>; choose another column with image_column"
        )
    return name


def choose_label_column(schema: pa.Schema, file: Path, wanted: str | None = None) -> str:
    """`wanted`, else `label`, `labels` or `fine_label`, else the only column the metadata calls a ClassLabel.

    A lone integer column is not taken for the label: it may as well be an identifier.
    Raises DataError when there is none or it is neither of an integer type nor of strings.
    """
    if wanted is not None:
        _require_column(schema, file, wanted, "label")
        name = wanted
    else:
        declared = [
            name
            for name, feature in features(schema, file).items()
            if name in schema.names and isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        ]
        candidates = [name for name in LABEL_COLUMNS if name in schema.names]
        if not candidates and len(declared) == 1:
            candidates = declared
        if not candidates:
            raise DataError(
                f"{file} has no label column: its columns are {_columns(schema)}; "
                "wanted `label` of type int64; name another one with label_column"
            )
        name = candidates[0]
    kind = schema.field(name).type
    if not pa.types.is_integer(kind) and not holds_strings(kind):
        raise DataError(
            f"{file}, column {name!r}: labels are {kind}, wanted integers "
            "0 .. number of classes - 1, or strings; convert them, or choose another column with label_column"
        )
    return name


def features(schema: pa.Schema, file: Path) -> Mapping[str, Any]:
    """`info.features` of the metadata key `huggingface`, {} if there is none. DataError if it is not JSON."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{file}: the schema metadata key `huggingface` is not JSON ({error}); write the file again without it"
        ) from error
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def class_names(schema: pa.Schema, file: Path, label_column: str) -> tuple[str, ...] | None:
    """The names the metadata gives the classes of `label_column`, in label order; None when it gives none."""
    feature = features(schema, file).get(label_column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not names:
        return None
    return tuple(str(name) for name in names)


def _require_column(schema: pa.Schema, file: Path, name: str, role: str) -> None:
    if name not in schema.names:
        raise DataError(
            f"{file} has no column {name!r}, which {role}_column asks for: its columns are {_columns(schema)}"
        )


def holds_strings(kind: pa.DataType) -> bool:
    """Plain or as a dictionary."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values))


def _holds_images(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    data = kind.field(kind.get_field_index("bytes")).type
    return bool(pa.types.is_binary(data) or pa.types.is_large_binary(data))


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
