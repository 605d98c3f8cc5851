"""The sum of the corrections of patches, against the corrections one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.border.system import subdomain_sum
from lsconv.border.system.subdomain_sum import Correction, PatchSum
from lsconv.fourier.symbol import FrequencyMatrices, Grid

pytestmark = pytest.mark.usefixtures("iterated")

F64 = torch.float64
SIZE = 40


def _definite(*shape: int) -> Tensor:
    root = torch.randn(*shape, dtype=F64)
    return root @ root.mT + torch.eye(shape[-1], dtype=F64)


def _slab(cells: int, length: int, blocks: int) -> Correction:
    """On border cells taken at random."""
    grid = Grid((length,), real=True)
    matrices = _definite(blocks, length // 2 + 1, cells, cells).to(torch.complex128)
    return Correction(torch.randperm(SIZE)[: cells * length], (cells, length), FrequencyMatrices(grid, matrices))


def _dense(size: int, blocks: int) -> Correction:
    return Correction(torch.randperm(SIZE)[:size], (size,), DenseInverse(_definite(blocks, size, size), definite=True))


def _patches(kind: str, blocks: int) -> list[Correction]:
    if kind == "square":
        return [_slab(3, 8, blocks), _slab(3, 8, blocks), _dense(7, blocks)]
    if kind == "slabs alone":
        return [_slab(5, 6, blocks), _slab(5, 6, blocks)]
    if kind == "oblong":
        return [_slab(3, 8, blocks), _slab(3, 10, blocks), _dense(7, blocks)]
    return [_dense(SIZE, blocks)]


KINDS = ["square", "slabs alone", "oblong", "one"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("matrices", ["of every block", "one for all"])
def test_additive_is_the_sum_of_all(kind: str, blocks: int, matrices: str) -> None:
    patches = _patches(kind, blocks if matrices == "of every block" else 1)
    r = torch.randn(3, blocks, SIZE, dtype=F64)
    want = sum(torch.zeros_like(r).index_add_(-1, p.index, p(r[..., p.index])) for p in patches)
    torch.testing.assert_close(PatchSum(patches, SIZE, None)(r), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("matrices", ["of every block", "one for all"])
def test_restricted_a_cell_has_the_correction_of_its_owner(kind: str, blocks: int, matrices: str) -> None:
    patches = _patches(kind, blocks if matrices == "of every block" else 1)
    r, size = torch.randn(3, blocks, SIZE, dtype=F64), SIZE
    reached = torch.stack([torch.zeros(size).index_fill_(0, p.index, 1.0) for p in patches])
    cells = reached.any(0).nonzero().flatten()  # what no patch reaches is no border
    owner = torch.multinomial(reached[:, cells].mT, 1).flatten()
    number = torch.full((size,), -1)
    number[cells] = torch.arange(len(cells))
    r, size = r[..., cells], len(cells)
    patches = [Correction(number[p.index], p.shape, p.inverse) for p in patches]
    own = torch.stack([torch.zeros_like(r).index_copy_(-1, p.index, p(r[..., p.index])) for p in patches])
    want = own.gather(0, owner.expand(1, *r.shape))[0]
    torch.testing.assert_close(PatchSum(patches, size, owner)(r), want)


def test_slabs_of_one_shape_are_inverted_together_while_they_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = _patches("square", 1)
    calls: list[tuple[int, ...]] = []
    on_grid = FrequencyMatrices.on_grid
    monkeypatch.setattr(FrequencyMatrices, "on_grid", lambda self, t: calls.append(tuple(t.shape)) or on_grid(self, t))
    r = torch.randn(1, 1, SIZE, dtype=F64)
    together = PatchSum(patches, SIZE, None)(r)
    monkeypatch.setattr(subdomain_sum, "_MOST_ENTRIES", 3 * 3 * 5 - 1)
    torch.testing.assert_close(PatchSum(patches, SIZE, None)(r), together)
    assert calls == [(1, 2, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8)]
