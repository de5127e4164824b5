"""What every test shares."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("distrobust", deadline=None)  # examples are small, but a shared core may be busy
settings.load_profile("distrobust")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are faster on one thread, and several ranks as threads would fight over the cores."""
    torch.set_num_threads(1)
