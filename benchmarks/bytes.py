"""How many bits does a coordinate cost on the wire, beside the entropy of its index and the bits of its value?

    python benchmarks/bytes.py

Messages of ResNet-50's 161 tensors (25,557,032 parameters) in DDP's buckets of 25 MB, exactly as the hook packs them:
headers, scales, tables of levels and padding included. Gradients are heavy-tailed and differ in scale from layer to
layer.
"""

from __future__ import annotations

import math
from typing import Any

import record
import torch
from local_part import one_rank

from distrobust.comm.bucket import Verdict
from distrobust.comm.exchange import EXCHANGES
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES

VALUE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "4bit": 4, "2bit": 2, "sign": 1}
DENSITIES = (0.01, 0.001, 0.0001)


def main() -> None:
    rows = [measure(d, i, v) for d in DENSITIES for i in INDEX_CODES for v in VALUE_CODES]
    for row in rows:
        print(
            f"{row['density']:.2%} {row['indices']:<11} {row['values']:<5} {row['bits_per_coordinate']:7.3f} bits, "
            f"floor {row['floor_bits']:7.3f}, {row['above_floor']:+.2%}; {row['fewer_bytes']:,.0f} times fewer"
        )
    print(record.write("bytes", (__doc__ or "").splitlines()[0], {"rows": rows}))


def measure(density: float, indices: str, values: str) -> dict[str, Any]:
    torch.manual_seed(0)
    settings, step, buckets = one_rank(density, values, indices)
    length = 0
    exchange = EXCHANGES["all_gather"][0]
    for bucket in buckets:
        message = next(exchange(settings, step, bucket, Verdict())).tensor
        length += message.numel()
    n = sum(b.flat.numel() for b in buckets)
    num_sent = sum(int((part.residual.next_v != part.gradient).sum()) for b in buckets for part in b.parts)
    entropy = (math.lgamma(n + 1) - math.lgamma(num_sent + 1) - math.lgamma(n - num_sent + 1)) / math.log(2)
    floor = entropy / num_sent + VALUE_BITS[values]
    return {
        "density": density,
        "indices": indices,
        "values": values,
        "bytes": length,
        "coordinates": num_sent,
        "bits_per_coordinate": 8 * length / num_sent,
        "floor_bits": floor,
        "above_floor": 8 * length / num_sent / floor - 1,
        "fewer_bytes": 4 * n / length,
    }


if __name__ == "__main__":
    main()
