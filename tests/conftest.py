"""What the tests share."""

import os

import hypothesis
import pytest
import torch

# Drawn examples are the same in every run, so that a failure is one everywhere.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("fixed")

# Largest relative and absolute difference of one convolution's result by another way of computing it.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


# torch.jit.script knows its builtins by id(), and an operator that gets another overload frees an object of that
# table: a list that is later born at its address was once taken for an operator. So the tests keep what is freed.
_kept: list[object] = []
_refresh_packet = torch._ops._refresh_packet


def _keep_and_refresh(packet):
    _kept.append(packet._op)
    _refresh_packet(packet)


torch._ops._refresh_packet = _keep_and_refresh


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        # One process per core already: more threads only wait for each other.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture
def assert_close():
    """`torch.testing.assert_close` with the tolerance of the expected tensor's type."""

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])

    return check


@pytest.fixture
def deterministic():
    """`torch.use_deterministic_algorithms(True)` for one test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
