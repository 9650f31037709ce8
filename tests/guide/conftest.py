"""Float64 in all tests of the guide."""

import pytest
import torch

from pavi_scale.ambient import precision


@pytest.fixture(autouse=True)
def _double():
    with precision(torch.float64):
        yield
