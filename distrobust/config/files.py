"""From a YAML file and overrides to a configuration, or to one line that says what to change; and back."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distrobust.config import once
from distrobust.config.section import Section
from distrobust.config.whole import Config
from distrobust.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides; raises ConfigError with one line that says what to change."""
    return parse(read(path, overrides), str(path))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load` validates: the file's sections as plain values, overrides applied."""
    try:
        values = once.load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file, see launch/"
        ) from None
    except once.RepeatedKeyError as error:
        raise ConfigError(f"{path}, {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: wanted sections like `data:` at the top, got {type(values).__name__}")
    for one in overrides:
        override(values, one)
    return values


def parse(values: Mapping[str, Any], source: str) -> Config:
    """Validates a nested mapping; raises ConfigError naming `source`."""
    return parse_as(Config, values, source)


def parse_as(kind: type[AnySection], values: Mapping[str, Any], source: str) -> AnySection:
    """`parse` for a configuration of another kind, such as a simulation's."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values, kind)}") from None


def dump(config: Section) -> str:
    """The resolved configuration as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def absolute(config: Config) -> Config:
    """Paths made absolute, for workers that run in another directory."""
    changed: dict[str, Section] = {
        "run": config.run.model_copy(update={"dir": config.run.dir.absolute()}),
        "data": config.data.model_copy(update={"path": config.data.path.absolute()}),
    }
    given = {"weights": config.model.weights, "directory": config.model.directory}
    changed["model"] = config.model.model_copy(update={key: path.absolute() for key, path in given.items() if path})
    return config.model_copy(update=changed)


def first_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """'train.epochs: 3 here, 6 there' for the first place where two nested values differ, None if they agree."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            where = f"{path}.{key}" if path else str(key)
            found = first_difference(ours.get(key), theirs.get(key), where)
            if found:
                return found
        return None
    return None if ours == theirs else f"{path}: {ours} here, {theirs} there"


def override(values: dict[str, Any], assignment: str) -> None:
    """Applies one `a.b=c`, in place; ConfigError where it is none or goes through a value."""
    path, separator, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {assignment}: wanted section.key=value, for example compress.density=0.01")
    try:
        value = once.load(text)
    except once.RepeatedKeyError as error:
        raise ConfigError(f"--set {assignment}, {error}") from None
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment}: the value is not YAML; quote it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment}: {key!r} holds a value, not a section")
        values = inner
    values[keys[-1]] = value


def _explain(error: ValidationError, values: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """The first problem in one line; a key nobody knows comes first, since it explains a missing one."""
    # of a number or "auto" pydantic reports both alternatives, by names of its own: only the number's is of use
    wanted = [problem for problem in error.errors() if not str(problem["loc"][-1:]).startswith('("literal[')]
    problems = sorted(wanted, key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    keys = [part for part in problem["loc"] if part != "constrained-float"]
    place = [str(part) for part in keys]
    path = ".".join(place)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(place[:-1], kind)
        close = difflib.get_close_matches(place[-1], valid, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
        return f"unknown key {path!r}; {hint}{more}"
    if problem["type"] == "missing":
        return f"{path} is missing; give it in the file or with --set {path}=...{more}"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "wanted", 1)
    got: Any = values
    for part in keys:
        if isinstance(got, Mapping):
            got = got.get(part)
        elif isinstance(got, Sequence) and not isinstance(got, str) and isinstance(part, int):
            got = got[part]
    return f"{path or 'configuration'}: {text}{'' if isinstance(got, Mapping) else f', got {got!r}'}{more}"


def _valid_keys(place: list[str], kind: type[BaseModel]) -> list[str]:
    """place: of a section, through sections and numbers of entries in a list of them."""
    model: Any = kind
    for name in place:
        model = _section(model.model_fields[name].annotation) if name in model.model_fields else model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The one in `Section | None`, or in `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
