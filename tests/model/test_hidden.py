from pathlib import Path

import pytest
import torch

from slimlm.model.hidden import Spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_replaced_is_what_is_read_whatever_was_there(tmp_path: Path, dtype: torch.dtype):
    """Nothing at first, then narrower batches of another dtype; the last one is shorter."""
    hidden = Spilled(tmp_path / "hidden")
    for width, kind in ((6, dtype), (4, torch.float32), (5, dtype)):
        batches = [torch.randn(count, 3, width).to(kind) for count in (4, 4, 2)]
        for number, batch in enumerate(batches):
            hidden.replace(number, batch)
        hidden.turn()
        assert all(torch.equal(got, batch) for got, batch in zip(hidden, batches, strict=True))
        again = Spilled(tmp_path / "hidden")
        assert again.adopt(hidden.side, hidden.shapes, hidden.dtype, hidden.digest)
        assert torch.equal(again[1], batches[1])
