"""YAML in which no key of a mapping is given twice: of two, safe_load keeps the last without a word."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ValueError):
    """Key and lines, in words."""


def load(text: str) -> Any:
    """As yaml.safe_load. Raises yaml.YAMLError, RepeatedKeyError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            place, line = (key.tag, key.value), key.start_mark.line + 1
            if place in lines:
                raise RepeatedKeyError(
                    f"line {line}: {key.value!r} is given already in line {lines[place]}; leave one out"
                )
            lines[place] = line
        return node
