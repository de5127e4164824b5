"""The speed of a link, as people write it: 100mbit, 1gbit, 2.5gbit, 512kbit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distrobust.errors import ConfigError

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SLOWEST, _FASTEST = 64e3, 100e9
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

ETHERNET, IPV4, TCP = 14, 20, 32
HEADER_BYTES = ETHERNET + IPV4 + TCP  # of one packet: TCP with its timestamp option
FRAME_BYTES = 1500 + ETHERNET  # what Linux shapes
# In an exchange every host sends and receives at once, so each two frames of 1448 bytes of payload are followed by one
# acknowledgement of what came the other way: 93.6 % (two plain TCP streams through the lab: 93.5 to 94.0 of 100 Mbit/s)
GOODPUT = 2 * (FRAME_BYTES - HEADER_BYTES) / (2 * FRAME_BYTES + HEADER_BYTES)


@dataclass(frozen=True)
class Link:
    """Both directions of every host's connection to the switch carry `bits_per_s`, headers included."""

    bits_per_s: float

    @property
    def payload_bytes_per_s(self) -> float:
        """What TCP delivers at best in both directions at once: full frames, headers and acknowledgements taken off."""
        return self.bits_per_s / 8 * GOODPUT

    @property
    def burst_bytes(self) -> int:
        """What may pass at once at full speed: a millisecond's worth, at least four frames.

        A token bucket of 256 kB, as often recommended, lets a whole compressed gradient through unshaped.
        """
        return max(round(self.bits_per_s / 8 * 1e-3), 4 * FRAME_BYTES)

    def __str__(self) -> str:
        unit = next(unit for unit in ("gbit", "mbit", "kbit") if self.bits_per_s >= _UNITS[unit] or unit == "kbit")
        return f"{self.bits_per_s / _UNITS[unit]:g}{unit}"


def parse_link(text: str) -> Link:
    """'100mbit' -> Link. ConfigError for anything that is no bandwidth between 64kbit and 100gbit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]bit)(?:/s)?", text.strip().lower())
    if match is None:
        raise ConfigError(f"link: got {text!r}, wanted a bandwidth such as 10mbit, 100mbit or 1gbit")
    bits_per_s = float(match[1]) * _UNITS[match[2]]
    if not _SLOWEST <= bits_per_s <= _FASTEST:
        raise ConfigError(f"link: got {text!r}, wanted a bandwidth from 64kbit to 100gbit")
    return Link(bits_per_s)


def parse_latency(text: str) -> float:
    """'1ms' -> seconds one way. ConfigError for anything that is no time between 0 and 10 s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text.strip().lower())
    if match is None:
        raise ConfigError(f"latency: got {text!r}, wanted a time such as 100us, 1ms or 0.05s")
    seconds = float(match[1]) * _TIMES[match[2]]
    if seconds > 10.0:
        raise ConfigError(f"latency: got {text!r}, wanted a time from 0ms to 10s")
    return seconds
