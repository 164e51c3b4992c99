import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg import masks
from slimlm.linalg.masks import pooled, smallest, smallest_per_group, smallest_per_row, spread, spread_out

scores = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(lambda values: torch.tensor(values).float())


@given(scores, st.data())
def test_exactly_as_many_as_asked_for_the_smallest_and_among_ties_the_first(values, data):
    count = data.draw(st.integers(0, values.numel()))
    kept = values.clone()
    pruned = smallest(values, count)
    expected = sorted(range(len(values)), key=lambda index: (values[index].item(), index))[:count]
    assert pruned.nonzero().flatten().tolist() == sorted(expected)
    assert torch.equal(values, kept)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_rows_lose_exactly_their_own_counts(rows, columns, data):
    values = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)))
    values = values.float().view(rows, columns)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    pruned = smallest_per_row(values, counts)
    for row in range(rows):
        assert torch.equal(pruned[row], smallest(values[row], int(counts[row])))


@given(st.integers(0, 1000), st.integers(1, 40))
def test_a_total_spreads_over_rows_without_a_remainder(total, rows):
    counts = spread(total, rows)
    assert counts.sum() == total
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_every_group_keeps_its_largest(keep, group):
    values = torch.randint(0, 4, (6, 24), generator=torch.Generator().manual_seed(0)).float()
    pruned = smallest_per_group(values, keep, group)
    for row, mask in zip(values.view(-1, group), pruned.view(-1, group), strict=True):
        assert int((~mask).sum()) == keep
        assert row[~mask].min() >= row[mask].max()


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ValueError, match="cannot prune 5 of 4"):
        smallest(torch.ones(4), 5)
    with pytest.raises(ValueError, match="not whole groups of 4"):
        smallest_per_group(torch.ones(2, 6), 2, 4)


def test_chunks_do_not_change_the_mask(monkeypatch):
    values, counts = torch.randn(50, 8), spread(133, 50)
    whole = smallest_per_row(values, counts)
    monkeypatch.setattr(masks, "CHUNK_ELEMENTS", 24)
    assert torch.equal(smallest_per_row(values, counts), whole)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_tile_is_the_sum_of_what_is_in_it_and_stands_for_all_of_it(down: int, across: int, rows: int, columns: int):
    values = torch.arange(down * rows * across * columns).float().view(down * rows, across * columns)
    tiles = pooled(values, (rows, columns))
    large = tiles > tiles.mean()
    for i in range(down):
        for j in range(across):
            inside = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            assert tiles[i, j] == values[inside].sum()
            assert (spread_out(large, (rows, columns))[inside] == large[i, j]).all()


def test_what_is_not_whole_tiles_is_refused():
    with pytest.raises(ValueError, match="not whole tiles of 2x3"):
        pooled(torch.ones(4, 4), (2, 3))
