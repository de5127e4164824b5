"""CIFAR-10 as the Hugging Face layout holds it, when DISTROBUST_CIFAR10 names its directory."""

from __future__ import annotations

import os

import pytest
import torch

from distrobust.data import Shard, describe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "DISTROBUST_CIFAR10" not in os.environ,
        reason="DISTROBUST_CIFAR10 does not name a directory with CIFAR-10 in Parquet",
    ),
]


def test_cifar10_is_read_whole_and_alike_in_either_mode():
    directory = os.environ["DISTROBUST_CIFAR10"]
    train = describe(directory, "train")
    assert (train.total_rows, train.num_classes, train.shape) == (50_000, 10, (3, 32, 32))
    assert train.class_names[:3] == ("airplane", "automobile", "bird")
    test = describe(directory, "test", classes=train.class_names)
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for images, _ in Shard(test, 0, 1, seed=0, cache="stream").in_order(1000):
        scaled = images.double() / 255
        total += scaled.mean((2, 3)).sum(0)
        squares += scaled.square().mean((2, 3)).sum(0)
        count += len(images)
    assert count == 10_000
    # the published channel statistics of CIFAR-10; 0.01 leaves room for the test split and for JPEG
    mean = total / count
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]).double(), atol=0.01, rtol=0)
    deviation = (squares / count - mean.square()).sqrt()
    torch.testing.assert_close(deviation, torch.tensor([0.247, 0.243, 0.262]).double(), atol=0.01, rtol=0)
    memory, stream = (Shard(test, 1, 2, seed=0, cache=cache).batches(0, 256) for cache in ("memory", "stream"))
    for (images, labels), (other_images, other_labels) in zip(memory, stream, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
