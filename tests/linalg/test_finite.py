import pytest
import torch

from slimlm.linalg.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found_wherever_it_is(dtype, bad):
    x = torch.randn(7, 43, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0], x[-1, -1] = torch.finfo(dtype).min, torch.finfo(dtype).max
    assert all_finite(x)
    assert all_finite(x.T)
    for place in range(x.numel()):
        broken = x.clone()
        broken.view(-1)[place] = bad
        assert not all_finite(broken)
        assert not all_finite(broken.T[1:]) or place % 43 == 0


def test_nothing_is_finite():
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bool
