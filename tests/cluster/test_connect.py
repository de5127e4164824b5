"""What Ray is told before it is started."""

from typing import Any

import pytest

from distrobust import config
from distrobust.cluster.connect import group_start_timeout_s


@pytest.mark.parametrize(
    ("cluster", "seconds"),
    [
        ({"workers": 3, "start_timeout_s": 180}, 180),
        ({"workers": 3, "start_timeout_s": 0}, 1),
        ({"workers": 3, "start_timeout_s": 180, "min_workers": 2, "resize_every_s": 60}, 60),
        ({"workers": 3, "start_timeout_s": 180, "min_workers": 2, "resize_every_s": 5}, 10),
        ({"workers": 3, "start_timeout_s": 20, "min_workers": 2, "resize_every_s": 60}, 20),
    ],
)
def test_an_elastic_run_soon_looks_again_how_many_there_can_be(cluster: dict[str, Any], seconds: float) -> None:
    values = {"data": {"path": "data"}, "cluster": cluster, "train": {"batch_size": 48}}
    assert group_start_timeout_s(config.parse(values, "test")) == seconds
