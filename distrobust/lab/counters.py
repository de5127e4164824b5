"""Bytes that left: of this process's TCP sockets, and of a network interface.

Both are the kernel's own counters, the same for every method, whatever its hook says of itself. A socket's count is
payload (gloo's own headers included); the interface's count, taken at its queue, has the packet headers too.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distrobust.lab.namespaces import find_tool

# offsets into struct tcp_info of linux/tcp.h, Linux 4.6 and newer
_UNACKNOWLEDGED, _BYTES_ACKNOWLEDGED, _NOT_SENT, _SIZE = 24, 120, 144, 148
_SETTLE_S = 1.0  # a delayed acknowledgement takes 40 ms at most


@dataclass(frozen=True)
class Wire:
    """What an interface has sent: bytes with all packet headers, packets."""

    bytes: int
    packets: int


def tcp_sent_bytes() -> int:
    """Payload bytes that the open TCP sockets of this process have delivered: each byte once, however often repeated.

    Waits until everything sent is acknowledged, a second at most.
    """
    deadline = time.monotonic() + _SETTLE_S
    while True:
        sockets = list(_tcp_sockets())
        under_way = sum(waiting for _, waiting in sockets)
        if not under_way or time.monotonic() > deadline:
            return sum(delivered for delivered, _ in sockets)
        time.sleep(0.002)


def _tcp_sockets() -> Iterator[tuple[int, int]]:
    """(bytes acknowledged, packets or bytes that are not yet) of every TCP socket of this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        except OSError:  # gone meanwhile, or not TCP
            continue
        if len(info) >= _SIZE:
            unacknowledged, not_sent = (struct.unpack_from("I", info, at)[0] for at in (_UNACKNOWLEDGED, _NOT_SENT))
            yield struct.unpack_from("Q", info, _BYTES_ACKNOWLEDGED)[0], unacknowledged + not_sent


def wire_sent(interface: str, enter: Sequence[str] = ()) -> Wire:
    """What a shaped interface of the lab has sent so far. enter: the command that enters its namespace; empty: ours.

    From its queue, not from /sys/class/net: there a packet of 64 kB that the card would cut into 1500-byte frames
    counts as one packet with one header, here as the frames that a real link would carry.
    """
    command = [*enter, find_tool("tc"), "-s", "-j", "qdisc", "show", "dev", interface]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    queue = next(queue for queue in json.loads(answer) if queue.get("root"))
    return Wire(queue["bytes"], queue["packets"])
