"""The record of `distrobust evaluate` as lines for a terminal, and as a plot of accuracy against eps.

No line has a number without its attack, budget, seed, count, interval and flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distrobust.errors import ConfigError

Record = Mapping[str, Any]


def lines(record: Record) -> Iterator[str]:
    """The table, the expectation over budgets, accuracy per class, and the flags with what to do."""
    results = record["results"]
    width = max(len(result["score"]["attack"]) for result in results) + 2
    for role, title in (
        ("attack", ""),
        ("worst", ""),
        ("curve", "Curve"),
        ("check", "Checks, on a part of the images"),
    ):
        rows = [result for result in results if result["role"] == role]
        if rows and title:
            yield f"{title}:"
        yield from (_row(result, width) for result in rows)
    if record["expected"] is not None:
        yield _expected(record)
    yield from _per_class(record)
    passes = f"{record['forward_images']:,} images forward, {record['backward_images']:,} backward"
    yield f"Spent, all processes together: {record['seconds']:.1f} s, {passes} through the model"
    if not record["flags"]:
        yield "Flags: none"
    for flag in record["flags"]:
        yield f"Flag: {flag['name']}: {flag['reason']}"
        yield f"      do: {flag['remedy']}"


def _row(result: Record, width: int) -> str:
    score = result["score"]
    return (
        f"{score['attack']:<{width}}{100 * score['accuracy']:5.1f} %  95 % interval {100 * score['low']:.1f} .. "
        f"{100 * score['high']:.1f}  n = {score['samples']}  seed {score['seed']}  {score['seconds']:.1f} s  "
        f"{result['forward_images']:,} forward  flags: {_names(score['flags'])}"
    )


def _expected(record: Record) -> str:
    expected, seed = record["expected"], record["settings"]["seed"]
    curve = next(result for result in record["results"] if result["role"] == "curve")["score"]
    over = f"{expected['norm'].capitalize()} 0 .. {expected['eps_max']:.4g}"
    return (
        f"Expected robustness over {over} (PGD-{curve['steps']}): "
        f"{100 * expected['mean']:.1f} %  95 % interval {100 * expected['low']:.1f} .. {100 * expected['high']:.1f}  "
        f"n = {expected['samples']}  seed {seed}  flags: {_names(curve['flags'])}"
    )


def _per_class(record: Record) -> Iterator[str]:
    """The classes under the last attack at the budget, or clean without one: right of all of each."""
    *_, result = (result for result in record["results"] if result["role"] in ("attack", "worst"))
    score = result["score"]
    pairs = zip(record["classes"], score["class_correct"], score["class_samples"], strict=True)
    shown = ", ".join(f"{name} {right}/{samples}" for name, right, samples in pairs if samples)
    yield f"Per class, {score['attack']}, seed {score['seed']}, flags: {_names(score['flags'])}: {shown}"


def _names(flags: list[str]) -> str:
    return ", ".join(dict.fromkeys(flag.split(":")[0] for flag in flags)) or "none"


def check_plot(path: Path) -> None:
    """ConfigError if nothing can be drawn to `path`: better before the evaluation than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'distrobust[plots]'") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot: got {path}, wanted a file that ends in .png, .svg or .pdf")
    check_directory("--plot", path)


def check_directory(option: str, path: Path) -> None:
    """ConfigError if `path` has no directory to be written to."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: {path.parent} is no directory; create it first")


def draw(path: Path, record: Record) -> None:
    """Accuracy against eps with its intervals, other attacks as points; PNG, SVG or PDF by the ending of `path`."""
    check_plot(path)
    from matplotlib.figure import Figure

    results = record["results"]
    curve = [result["score"] for result in results if result["role"] == "curve"]
    clean = next(result["score"] for result in results if result["score"]["attack"] == "clean")
    others = [r["score"] for r in results if r["role"] == "attack" and r["score"]["attack"] != "clean"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    points = [clean, *curve]
    if curve:
        axes.errorbar(*_points(points), marker="o", markersize=4, capsize=3, label=f"PGD-{curve[0]['steps']}")
    for number, score in enumerate(others):
        name = score["attack"]
        axes.errorbar(*_points([score]), marker="s", markersize=5, color=f"C{number + 1}", linestyle="", label=name)
    norm = record["suite"]["threat"]["norm"].capitalize()
    axes.set(xlabel=f"eps ({norm}, images in [0, 1])", ylabel="accuracy, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    samples, seed = clean["samples"], record["settings"]["seed"]
    flags = _names([flag["name"] for flag in record["flags"]])
    axes.set_title(f"n = {samples}, seed {seed}, 95 % intervals\nflags: {flags}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _points(scores: list[Record]) -> tuple[list[float], list[float], list[list[float]]]:
    """(eps, accuracy, errors) in percent, as errorbar takes them."""
    accuracy = [100 * score["accuracy"] for score in scores]
    below = [100 * (score["accuracy"] - score["low"]) for score in scores]
    above = [100 * (score["high"] - score["accuracy"]) for score in scores]
    return [score["eps"] for score in scores], accuracy, [below, above]
