"""The devices of this machine: a test that takes `device` runs on each."""

import pytest
import torch

THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.fixture(params=[name for name in THERE if THERE[name]])
def device(request):
    return torch.device(request.param)
