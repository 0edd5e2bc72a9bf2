"""The mathematics on tensors, against one row and one product at a time in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lora import functional

SIZES = st.integers(1, 5)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, st.booleans(), st.floats(-2, 2))
def test_what_is_added_is_each_rows_own_product(
    n: int, inner: list[int], wide: int, out: int, rank: int, in_place: bool, scale: float
) -> None:
    x, output = numbers(n, *inner, wide, seed=1), numbers(n, *inner, out, seed=2)
    A, B = numbers(n, rank, wide, seed=3), numbers(n, rank, out, seed=4)
    expected = output.clone()
    for i in range(n):
        expected[i] += (x[i] @ A[i].T) @ B[i]
    found = functional.add_grouped_low_rank(output.clone(), x, A, B, in_place=in_place)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(output + functional.grouped_low_rank(x, A, B), expected)
    torch.testing.assert_close(output + functional.grouped_low_rank_reference(x, A, B), expected)
    found = functional.add_low_rank(output.clone(), x, A[0], B[0], scale, in_place=in_place)
    torch.testing.assert_close(found, output + scale * (x @ A[0].T @ B[0]))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_any_length(length: int, in_place: bool) -> None:
    x, output = numbers(3, length, 6, seed=1), numbers(3, length, 5, seed=2)
    A, B = numbers(3, 2, 6, seed=3), numbers(3, 2, 5, seed=4)
    expected = torch.stack([output[i] + x[i] @ A[i].T @ B[i] for i in range(3)])
    torch.testing.assert_close(functional.add_grouped_low_rank(output, x, A, B, in_place=in_place), expected)


def test_an_output_that_is_no_block_of_memory_is_added_to_as_well() -> None:
    x, A, B = numbers(4, 3, 6, seed=1), numbers(2, 6, seed=2), numbers(2, 5, seed=3)
    output = numbers(4, 5, 3, seed=4).transpose(1, 2)
    expected = output + 0.5 * (x @ A.T @ B)
    torch.testing.assert_close(functional.add_low_rank(output, x, A, B, 0.5, in_place=True), expected)


def test_gradients_flow_through_the_sum() -> None:
    x, output = numbers(3, 4, 6, seed=1).requires_grad_(), numbers(3, 4, 5, seed=2).requires_grad_()
    A, B = numbers(3, 2, 6, seed=3), numbers(3, 2, 5, seed=4)
    assert torch.autograd.gradcheck(lambda x, o: functional.add_grouped_low_rank(o, x, A, B), (x, output))
    assert torch.autograd.gradcheck(lambda x, o: functional.add_low_rank(o, x, A[0], B[0], 0.3), (x, output))
