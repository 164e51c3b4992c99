"""That the shapes in `linalg`'s types are checked while tests run."""

import ast
from pathlib import Path
from typing import Annotated

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import slimlm.linalg
from slimlm.linalg.hessian import hessian
from slimlm.linalg.obs import joint
from slimlm.linalg.ridge import Fit
from slimlm.prune import masks
from tests.house_functions import functions_of
from tests.shapes import checked


@pytest.mark.parametrize(
    ("weight", "pruned"),
    [
        (torch.ones(3, 5), torch.zeros(3, 4, dtype=torch.bool)),
        (torch.ones(3, 1), torch.zeros(3, 4, dtype=torch.bool)),
        (torch.ones(3, 4), torch.zeros(3, 4)),
        (torch.ones(4), torch.zeros(4, dtype=torch.bool)),
    ],
)
def test_a_wrong_shape_or_kind_is_caught_even_if_it_broadcasts(weight: Tensor, pruned: Tensor):
    with pytest.raises(TypeCheckError):
        joint(weight, hessian(torch.eye(4)), pruned)


def test_other_rooms_have_the_checked_functions():
    with pytest.raises(TypeCheckError):
        masks.smallest_per_row(torch.ones(2, 3), torch.ones(3, dtype=torch.long))


def test_classes_are_checked():
    with pytest.raises(TypeCheckError):
        Fit(torch.ones(2), 1.0)


def test_what_is_given_back_is_checked():
    @checked
    def first(x: Annotated[Tensor, "n"], count: int) -> Annotated[Tensor, "{count}"]:
        return x[:count]

    assert first(torch.ones(3), 2).shape == (2,)
    with pytest.raises(TypeCheckError):
        first(torch.ones(3), 4)


def test_every_public_tensor_of_linalg_has_its_shape_in_its_type():
    for path in sorted(Path(slimlm.linalg.__file__).parent.glob("*.py")):
        for function in functions_of(Path(path.name), ast.parse(path.read_text())):
            assert not function.is_public or not function.has_bare_tensors, function.place
