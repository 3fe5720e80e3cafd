from collections.abc import Iterator

import pytest
import torch

import convoxel


@pytest.fixture(autouse=True)
def _fresh_runtime() -> Iterator[None]:
    """Every test starts from the defaults: best ISA, strict off, two threads, its own seed."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    convoxel.set_strict(False)
    convoxel.set_isa(convoxel.isas()[-1])
    convoxel.set_conv_algorithm("auto")
    convoxel.set_float32_conv_precision("high")
    convoxel.reset_stats()
    yield


@pytest.fixture(params=convoxel.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each instruction set of this machine."""
    convoxel.set_isa(request.param)
    return str(request.param)
