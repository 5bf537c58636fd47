"""Measures of one convolution's filters: their bounds, their thresholds, and what they are not moved by."""

import math

import pytest
import torch
from torch import nn

from poolskip_zoo.diagnostics import diagnose
from poolskip_zoo.diagnostics.cost import measure_latency
from poolskip_zoo.diagnostics.measures import (
    filters_of,
    l2_l1,
    orthogonality,
    small_weights,
    sparsity,
    variance_entropy,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_l2_l1_between_its_bounds():
    assert l2_l1(torch.full((2, 3, 3), -0.5)) == pytest.approx(1 / math.sqrt(18))
    assert l2_l1(torch.tensor([0.0, 0.0, 7.0])) == 1
    assert l2_l1(torch.zeros(4)) is None


def test_sparse_kernels_are_below_a_hundredth_of_the_largest_weight():
    kernels = torch.zeros(2, 2, 3, 3)
    kernels[0, 0, 1, 1] = 1
    kernels[0, 1, 2, 0] = -0.011
    kernels[1, 0] = 0.009
    assert sparsity(kernels) == 0.5
    assert sparsity(torch.zeros(2, 2, 3, 3)) == 1


def test_variance_entropy_counts_equal_directions():
    kernels = torch.cat([torch.eye(9)[:4], -torch.eye(9)[:4]]).view(4, 2, 3, 3)
    assert variance_entropy(kernels) == pytest.approx(math.log10(4))
    assert variance_entropy(torch.randn(200, 200, 3, 3)) == pytest.approx(math.log10(9), abs=1e-3)
    assert variance_entropy(torch.ones(5, 1, 3, 3)) == 0
    assert variance_entropy(torch.randn(1, 1, 3, 3)) is None


def test_variance_entropy_is_of_what_kernels_differ_in():
    """What they have in common counts as no direction."""
    kernels = torch.randn(50, 1, 3, 3)
    assert variance_entropy(kernels + 100) == pytest.approx(variance_entropy(kernels), abs=1e-3)


def test_orthogonality_within_groups():
    half = math.sqrt(0.5)
    rows = torch.tensor([[1.0, 0.0], [half, half], [0.0, 2.0]])
    assert orthogonality(rows) == pytest.approx(1 - 2 * half / 3)
    # In two groups the parallel filters of different groups do not meet.
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert orthogonality(rows, groups=2) == 1
    assert orthogonality(rows) == pytest.approx(1 - 2 / 6)
    assert orthogonality(rows, groups=4) is None


def test_small_weights_at_the_threshold():
    filters = torch.ones(1000, 1, 3, 3)
    filters[3], filters[5], filters[7] = 0, 0.0099, 0.0102
    assert small_weights(filters) == [3, 5]
    assert small_weights(torch.zeros(2, 1, 3, 3)) == [0, 1]


def test_small_weights_are_measured_by_the_root_of_the_mean_square():
    """Of a hundred filters of which one is large, a tenth of that one; their mean would be a hundredth."""
    filters = torch.full((100, 1, 3, 3), 0.02)
    filters[0], filters[1], filters[2] = 1000, 0.5, 2
    assert small_weights(filters) == [1, *range(3, 100)]


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_weights_are_turned(groups):
    module = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    before = module(torch.randn(1, 4, 5, 5))
    silent = filters_of(module.weight, module)
    assert silent.shape == (6, 4 // groups, 3, 3)
    with torch.no_grad():
        # Output channel 4 is the second of the second group, or the fifth of one.
        module.weight[4 // groups * (groups - 1) :, 4 % (6 // groups)] = 0
    assert diagnose(nn.Sequential(module)).layers[0].inert == [4]
    after = module(torch.randn(1, 4, 5, 5))
    assert before[:, 4].any()
    assert not after[:, 4].any()


def test_latency_begins_each_round_with_another_program() -> None:
    ran: list[str] = []
    assert len(measure_latency([lambda: ran.append("a"), lambda: ran.append("b")], rounds=2)) == 2
    assert "".join(ran) == "abbaabba"
