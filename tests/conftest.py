"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are faster on one thread, and several ranks as threads would fight over the cores."""
    torch.set_num_threads(1)
