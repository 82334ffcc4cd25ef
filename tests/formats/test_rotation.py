"""Rotation: orthogonal, its own inverse's inverse, signs fixed by the seed alone."""

import pytest
import torch

from ternc.formats.rotation import MAX_BLOCK, Rotation
from ternc.runtime import ops

MASK = (1 << 64) - 1


@pytest.fixture(autouse=True)
def registered():
    ops.register()


def splitmix64(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 12345, -7, 2**63 - 1, 2**70 + 3])
def test_signs_are_the_formula(seed):
    signs = Rotation.of(64, seed).signs(64)
    wanted = [-1 if splitmix64((splitmix64(k) + seed) & MASK) >> 63 else 1 for k in range(64)]
    assert signs.tolist() == wanted


@pytest.mark.parametrize(
    ("columns", "block"),
    [(768, 256), (2560, 512), (6912, 256), (14336, 2048), (7, 1), (8192, 4096)],
)
def test_block_is_the_largest_power_of_two_within(columns, block):
    assert Rotation.of(columns, 0).block == block <= MAX_BLOCK


def test_products_survive_and_the_inverse_restores():
    torch.manual_seed(0)
    x, w = torch.randn(5, 96), torch.randn(7, 96)
    rotation = Rotation.of(96, 3)
    torch.testing.assert_close(rotation.rotate(x) @ rotation.rotate(w).T, x @ w.T)
    torch.testing.assert_close(rotation.restore(rotation.rotate(x)), x)
    assert not torch.allclose(rotation.rotate(x), x, atol=0.1)


def test_seeds_give_different_signs():
    assert Rotation.of(64, 0).signs(64).ne(Rotation.of(64, 1).signs(64)).any()
