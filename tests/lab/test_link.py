"""Bandwidths and times as people write them."""

import pytest

from distrobust.bench.methods import parse_densities
from distrobust.errors import ConfigError
from distrobust.lab.link import GOODPUT, Link, parse_latency, parse_link


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [("100mbit", 100e6), ("1gbit", 1e9), ("10Mbit", 10e6), ("2.5gbit/s", 2.5e9), (" 512 kbit ", 512e3)],
)
def test_a_bandwidth_is_read_as_it_is_written(text: str, bits_per_s: float) -> None:
    assert parse_link(text).bits_per_s == bits_per_s


@pytest.mark.parametrize("text", ["", "100", "fast", "100mb", "-1mbit", "1kbit", "900gbit", "1e3mbit", "0gbit"])
def test_nonsense_is_refused_in_one_line_that_shows_what_is_wanted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^link: got .* wanted a bandwidth [^\n]*bit") as caught:
        parse_link(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["10mbit", "100mbit", "1gbit", "2.5gbit", "512kbit"])
def test_a_link_prints_what_was_read(text: str) -> None:
    assert str(parse_link(text)) == text


def test_the_burst_is_a_millisecond_and_never_less_than_a_few_frames() -> None:
    assert Link(1e9).burst_bytes == 125_000
    assert Link(1e6).burst_bytes == 4 * 1514


def test_payload_leaves_room_for_headers_and_acknowledgements() -> None:
    assert 0.93 < GOODPUT < 0.94  # two plain TCP streams, one each way, through the lab: 0.935 to 0.940
    assert Link(8e6).payload_bytes_per_s == pytest.approx(1e6 * GOODPUT)


@pytest.mark.parametrize(("text", "seconds"), [("1ms", 1e-3), ("50us", 50e-6), ("0.5s", 0.5), ("0ms", 0.0)])
def test_a_latency_is_read_as_it_is_written(text: str, seconds: float) -> None:
    assert parse_latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["1", "soon", "11s", "-1ms"])
def test_a_nonsense_latency_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="latency: got"):
        parse_latency(text)


def test_densities_are_shares() -> None:
    assert parse_densities("0.01, 0.001") == [0.01, 0.001]
    for text in ("", "0", "1.5", "1%", "0.1,,0.2", "nan"):
        with pytest.raises(ConfigError, match="densities: got"):
            parse_densities(text)
