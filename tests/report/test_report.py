"""The report page: self-contained, escaped, and never empty-handed."""

import builtins
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distrobust.errors import CheckpointError, ConfigError
from distrobust.metrics.jsonl import JsonLines
from distrobust.report.run import write_report
from distrobust.report.story import tell

EVIL = "<script>alert('&')</script>$x_$"  # the end is mathematics to matplotlib, and wrong
RATIO, NOISE = "Learning-rate ratio per layer group", "Gradient noise per layer group"


def step(phase: str, number: int, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "event": "step", "time": 1.79e9 + number, "phase": phase, "step": number, "epoch": number / 100,
        "loss": 2.0 - number / 200, "accuracy": 0.5, "lr": 0.1, "eps": 0.03, "density": 0.01,
        "sent_bytes": 1000 * number, "dense_bytes": 50_000 * number, "step_s": 0.2, "attack_s": 0.1, "hook_s": 0.01,
        "residual_norm_ratio": 5.0, "nonfinite_steps": 0, "layer_lr_ratio": {"stem": 1.0, "head": 0.8},
        "layer_noise": {"stem": 0.1, "head": 0.3}, "samples": number,
    }  # fmt: skip
    return record | changes


def phase(name: str) -> list[dict[str, Any]]:
    start = {"event": "phase", "time": 1.79e9, "phase": name, "num_steps": 100, "steps_per_epoch": 50, "num_epochs": 2}
    steps = [step(name, number) for number in range(10, 101, 10)]
    epochs = [
        {"event": "epoch", "phase": name, "step": number, "epoch": number // 50, "clean_accuracy": 0.6,
         "robust_accuracy": 0.3, "attack": "PGD-10 Linf 8/255", "samples": 500}
        for number in (50, 100)
    ]  # fmt: skip
    watches = [
        {"event": "watch", "phase": name, "step": number, "fgsm_accuracy": 0.4, "pgd_accuracy": 0.35, "gap": 0.05}
        for number in (50, 75, 100)
    ]
    return [start, *steps, *epochs, *watches]


RUN = {"event": "run", "time": 1.79e9, "world_size": 2, "num_parameters": 413_466, "resumed_step": 0,
       "config": {"compress": {"density": 0.01, "clip": None}}, "versions": {"torch": "2.13.0"}}  # fmt: skip
EVALUATIONS = [
    {"event": "evaluation", "model": model, "attack": attack, "accuracy": accuracy, "low": accuracy - 0.01,
     "high": accuracy + 0.01, "samples": 2000, "seed": 7, "seconds": 1.0, "flags": []}
    for model, attack, accuracy in (
        ("pre-trained", "clean", 0.812),
        ("pre-trained", "PGD-20 Linf 8/255", 0.021),
        ("fine-tuned", "clean", 0.655),
        ("fine-tuned", "PGD-20 Linf 8/255", 0.331),
    )
]  # fmt: skip
WHOLE = [RUN, *phase("pretrain"), *phase("train"), *EVALUATIONS, {"event": "done", "seconds": 94.0}]


def page(directory: Path, records: list[dict[str, Any]]) -> str:
    lines = JsonLines(directory / "metrics.jsonl")
    for record in records:
        lines.write(record)
    lines.close()
    return write_report(directory).read_text(encoding="utf-8").replace("\u00a0", " ")


class Balance(HTMLParser):
    """Fails on a tag that is closed but not the innermost open one, and lists the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(tmp_path_factory.mktemp("runs") / "digits", WHOLE)


def test_report_is_self_contained(whole: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", whole)
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b", whole)
    assert set(re.findall(r'(?:href|src)="(.)', whole)) == {"#"}


def test_the_page_is_well_formed_and_ids_are_unique(whole: str) -> None:
    parser = Balance()
    parser.feed(whole)
    assert parser.open == []
    assert parser.tags.count("figure") == 11
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', whole))
    ids = re.findall(r'\bid="([^"]+)"', whole)
    assert used
    assert all(ids.count(name) == 1 for name in used)


def test_the_headline_has_results_budget_seed_samples_and_bytes(whole: str) -> None:
    for part in ("digits", "413,466 parameters", "2 workers", "2.1 % → 33.1 %", "81.2 % → 65.5 %", "1 min 34 s",
                 "PGD-20 Linf 8/255", "32.1 % to 34.1 %", "<td class=n>2000</td>", "<td class=n>7</td>",
                 "50.0 times fewer", "compress.density", ">finished<"):  # fmt: skip
        assert part in whole


def test_every_plot_is_there_and_described_in_words(whole: str) -> None:
    alts = re.findall(r'<svg viewBox="[^"]+" role="img" aria-label="([^"]+)"', whole)
    titles = ["Accuracy", "One step against ten", "Loss", "Bytes sent", "Density", "Learning rate", "Attack radius",
              "Step time", "Residual", RATIO, NOISE]  # fmt: skip
    assert [alt.split(":")[0] for alt in alts] == titles
    assert alts[1] == "One step against ten: under FGSM from 40 to 40 %, under PGD-10 from 35 to 35 %"
    assert alts[2] == "Loss: loss from 1.95 to 1.5"
    assert alts[-1] == f"{NOISE}: stem from 0.1 to 0.1, head from 0.3 to 0.3"


def test_drawings_take_every_colour_from_the_page(whole: str) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", whole, flags=re.DOTALL):
        assert "var(--" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'="#[^"]*"|url\(#[^)]*\)', "", drawing))


def test_text_is_escaped(tmp_path: Path) -> None:
    records = [
        RUN | {"config": {EVIL: {"path": EVIL}}, "versions": {EVIL: EVIL}},
        {"event": "phase", "phase": EVIL, "num_steps": 100},
        *(
            step(EVIL, number, layer_lr_ratio={EVIL: 1.0, "<b>": 0.5}, layer_noise={EVIL: 1.0, "<b>": 0.5})
            for number in (10, 20)
        ),
        *(row | {"model": EVIL, "attack": EVIL, "flags": [EVIL]} for row in EVALUATIONS),
        {"event": "notice", "text": EVIL},
        *phase("train"),
    ]
    text = page(tmp_path / "<b>run", records)
    assert "<script" not in text
    assert "<b>" not in text.replace("<b style", "")
    assert "&lt;script&gt;" in text


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path: Path) -> None:
    assert "\u5c42</text>" in page(tmp_path, [step("train", 1, layer_noise={"\u5c42": 1.0})])


def test_a_text_that_names_the_drawings_font_ends_before_its_tag(tmp_path: Path) -> None:
    Balance().feed(page(tmp_path, [*phase("'DejaVu Sans'"), *phase("train")]))


@pytest.mark.parametrize(
    "records",
    [
        WHOLE[:1],
        [{"event": "notice", "text": "only this"}],
        [step("train", 10)],
        [{"event": "step", "phase": "train", "step": 10}],
        [{"event": "phase", "phase": "train", "num_steps": 0}],
        [{"event": "evaluation", "model": "m", "attack": "clean", "accuracy": None, "samples": None}],
        WHOLE[: 1 + len(phase("pretrain")) + 4],
        EVALUATIONS[:1],
        EVALUATIONS[3:],
        [step("train", n, sent_bytes=0, dense_bytes=0, loss=None, density=None) for n in (10, 20)],
        [step("train", n, layer_lr_ratio=None, layer_noise=None, residual_norm_ratio=None) for n in range(1, 400)],
    ],
)  # fmt: skip
def test_a_partial_run_shows_what_there_is(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    text = page(tmp_path, records)
    Balance().feed(text)
    assert "not finished" in text


Cell = tuple[float, float, int]  # left, right, number of the colour


def groups(drawing: str) -> list[str]:
    """The names beside the rows, from the top."""
    names = re.findall(r'text-anchor: end; .*? y="([^"]+)".*?>([^<]*)</text>', drawing)
    return [name for _, name in sorted(names, key=lambda place: float(place[0]))]


def rows(drawing: str) -> list[list[Cell]]:
    """The cells of every row, from the top."""
    found: dict[float, list[Cell]] = {}
    for row in re.findall(r'<g id="PolyCollection.*?</g>', drawing, flags=re.DOTALL):
        for path, colour in re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--h(\d)\)', row):
            numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
            found.setdefault(min(numbers[1::2]), []).append((min(numbers[::2]), max(numbers[::2]), int(colour)))
    return [found[top] for top in sorted(found)]


def maps(directory: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The heat maps on the page, by title."""
    found = re.findall(r'<svg [^>]*aria-label="([^:]*):.*?</svg>', page(directory, records), flags=re.DOTALL)
    drawings = re.findall(r"<svg .*?</svg>", (directory / "report.html").read_text(), flags=re.DOTALL)
    return {title: drawing for title, drawing in zip(found, drawings, strict=True) if title in (RATIO, NOISE)}


def test_every_group_is_a_row_of_the_heat_map_in_order_of_appearance(tmp_path: Path) -> None:
    names = ["stem", "layer1", "attention", "head"]
    some = dict.fromkeys(["attention", "head"], 1.0)  # measured a step before the others
    ratio = dict.fromkeys(names, 0.5)
    first = step("train", 10, layer_lr_ratio=ratio, layer_noise=some)
    drawings = maps(tmp_path, [first, step("train", 20, layer_lr_ratio=ratio, layer_noise=dict.fromkeys(names, 1.0))])
    for title in (RATIO, NOISE):
        assert groups(drawings[title]) == names
        assert len(rows(drawings[title])) == len(names)


def test_a_cell_has_the_colour_of_its_value(tmp_path: Path) -> None:
    ratios = [0.05, 0.2, 0.3, 0.45, 0.55, 0.7, 0.8, 0.95]  # in eighths, from the lowest to the highest
    records = [
        step("train", 10 * number, layer_lr_ratio={"a": 1.0, "b": ratio}, layer_noise={"a": 0.0, "b": 1.5 * 2**number})
        for number, ratio in enumerate(ratios, start=1)
    ]
    drawings = maps(tmp_path, records)
    quiet, falling = rows(drawings[RATIO])
    assert [colour for *_, colour in falling] == list(range(8))
    assert [colour for *_, colour in quiet] == [7]
    assert (quiet[0][0], quiet[0][1]) == (falling[0][0], falling[-1][1])
    still, loud = rows(drawings[NOISE])  # equal factors, so that a doubling is a little more than one colour
    assert [colour for *_, colour in loud] == list(range(8))
    assert [colour for *_, colour in still] == [0]
    labels = [re.findall(r"text-anchor: start[^>]*>([^<]*)</text>", drawings[title]) for title in (RATIO, NOISE)]
    assert labels[0] == ["0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "1"]
    assert (labels[1][0], labels[1][-1]) == ("3", "380")


def test_equal_noise_is_one_colour_and_not_a_range_of_its_own(tmp_path: Path) -> None:
    records = [step("train", number, layer_noise={"a": 1.0 + number / 1000}) for number in range(1, 10)]
    (row,) = rows(maps(tmp_path, records)[NOISE])
    assert len(row) == 1


def test_a_missing_value_leaves_a_gap(tmp_path: Path) -> None:
    noise = {30: {"a": 1.0}, 40: {"a": 1.0, "b": math.nan}, 50: None, 60: {}}
    both = {"a": 1.0, "b": 1.0}
    drawings = maps(tmp_path, [step("train", n, layer_noise=noise.get(n, both)) for n in range(10, 101, 10)])
    a, b = rows(drawings[NOISE])
    column = (a[-1][1] - a[0][0]) / 10
    assert len(a) == len(b) == 2
    # coordinates are written with six decimals
    assert a[1][0] - a[0][1] == pytest.approx(2 * column, abs=1e-4)
    assert b[1][0] - b[0][1] == pytest.approx(4 * column, abs=1e-4)


def test_many_records_are_averaged(tmp_path: Path) -> None:
    ratios = {0: 0.2, 1: 0.9}  # 10 records a column
    drawings = maps(tmp_path, [step("train", n, layer_lr_ratio={"a": ratios[n % 2]}) for n in range(1, 601)])
    (row,) = rows(drawings[RATIO])
    assert [colour for *_, colour in row] == [3]  # from 0.5 to 0.6


def test_records_at_uneven_steps_leave_no_gap(tmp_path: Path) -> None:
    """Columns of 40 steps, records up to 50 apart."""
    steps = sorted({*range(50, 2401, 50), *range(60, 2401, 60)})
    assert len(steps) > 60
    (row,) = rows(maps(tmp_path, [step("train", n, layer_noise={"a": 1.0}) for n in steps])[NOISE])
    assert len(row) == 1


@pytest.mark.parametrize("ratio", [{}, None, {"stem": 1.0, "head": 1.0}, {"stem": math.nan}])
def test_a_run_without_noise_has_no_heat_map(tmp_path: Path, ratio: dict[str, float] | None) -> None:
    for noise in ({}, None):
        records = [step("train", number, layer_lr_ratio=ratio, layer_noise=noise) for number in (10, 20)]
        assert maps(tmp_path, records) == {}


def test_light_and_dark_colours_of_a_heat_map_both_come_from_the_page(whole: str) -> None:
    light, dark = (dict(re.findall(r"--(h\d): (#\w{6})", part)) for part in whole.split("prefers-color-scheme: dark"))
    scale = {f"h{number}" for number in range(8)}
    assert light.keys() == dark.keys() == scale
    assert all(light[name] != dark[name] for name in scale)
    drawings = re.findall(r"<svg .*?</svg>", whole, flags=re.DOTALL)
    used = [set(re.findall(r"var\(--(h\d)\)", drawing)) for drawing in drawings]
    assert used[-2:] == [scale, scale]
    assert not any(used[:-2])


def test_an_unfinished_run_shows_the_accuracy_of_its_newest_epoch(tmp_path: Path) -> None:
    text = page(tmp_path, WHOLE[: -len(EVALUATIONS) - 1])
    assert "robust accuracy, newest epoch" in text
    assert "30.0 %" in text


def test_restarts_are_marked_and_the_abandoned_steps_replaced(tmp_path: Path) -> None:
    first = [RUN, *phase("train")[:8]]  # up to step 70
    again = [RUN | {"resumed_step": 50}, phase("train")[0], step("train", 60, loss=9.0)]
    story = tell("x", [*first, *again])
    assert story.restarts == [(50, "resumed after step 50 of fine-tuning")]
    losses = {record["step"]: record["loss"] for record in story.phases[0].steps}
    assert list(losses) == [10, 20, 30, 40, 50, 60, 70]
    assert losses[60] == 9.0
    assert "resumed after step 50 of fine-tuning" in page(tmp_path, [*first, *again])


def test_wall_time_is_that_of_all_starts_without_the_time_between(tmp_path: Path) -> None:
    first = [RUN, *phase("pretrain"), step("train", 60)]  # at its last record 60 s are over
    assert tell("x", WHOLE).seconds == 94.0
    later = [record | {"time": record["time"] + 5000} if "time" in record else record for record in WHOLE]
    assert tell("x", [*first, *later]).seconds == 60.0 + 94.0
    assert tell("x", first).seconds is None
    assert "2 min 34 s" in page(tmp_path, [*first, *later])


def test_phases_follow_each_other_on_one_axis() -> None:
    phases = tell("x", WHOLE).phases
    assert [(phase.title, phase.offset) for phase in phases] == [("pre-training", 0), ("fine-tuning", 100)]


def test_a_restart_of_the_second_phase_is_placed_behind_the_first() -> None:
    story = tell("x", [*WHOLE, RUN | {"resumed_step": 40, "resumed_phase": "train"}])
    assert [place for place, _ in story.restarts] == [140]


def test_a_torn_last_line_does_not_stop_the_report(tmp_path: Path) -> None:
    page(tmp_path, WHOLE[:1])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "st')
    assert write_report(tmp_path).is_file()


@pytest.mark.parametrize("content", [None, b"", b'{"event": "st'])
def test_a_directory_without_records_is_an_error_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return whole_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'distrobust\[plots\]'"):
        page(tmp_path, WHOLE)


def test_a_report_replaces_the_earlier_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    assert "Worth knowing" not in page(tmp_path, WHOLE[:1])
    assert "Worth knowing" in page(tmp_path, [{"event": "notice", "text": "careful"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
