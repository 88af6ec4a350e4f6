"""Token dropout: a hash of (seed, stream, position)."""

import math

import pytest
import torch

from negengine.ops import keep_tokens

WORD = 2**64


def splitmix64(z: int) -> int:
    """The finaliser as published (Steele et al., OOPSLA 2014), on Python integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def seed(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize("value,stream", [(0, 0), (7, 3), (-5, 56), (2**62, 10**6)])
def test_it_is_splitmix64(value, stream):
    step = 0x9E3779B97F4A7C15
    key = splitmix64((value * step + stream) % WORD)
    numbers = [(splitmix64((key + p * step) % WORD) >> 11) / 2**53 for p in range(12)]
    assert keep_tokens(3, 4, 0.4, seed(value), stream).flatten().tolist() == [u >= 0.4 for u in numbers]


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5, 0.95])
def test_each_token_is_left_out_with_the_given_probability(dropout):
    kept = keep_tokens(40, 1000, dropout, seed(3), 1)
    assert kept.dtype == torch.bool
    assert kept.shape == (40, 1000)
    sigma = math.sqrt(dropout * (1 - dropout) / 40_000)
    assert abs(kept.double().mean() - (1 - dropout)) <= 4 * sigma
    assert (kept.double().mean(1) - (1 - dropout)).abs().max() <= 4.5 * sigma * math.sqrt(40)


def test_seeds_streams_rows_and_neighbours_are_independent():
    draws = [keep_tokens(2, 20_000, 0.5, seed(s), stream) for s in (0, 1, 2) for stream in (0, 1, 2)]
    rows = torch.cat([*draws, draws[0].roll(1, dims=1)]).double() - 0.5
    correlation = rows @ rows.T / (0.25 * 20_000)
    off = correlation - torch.eye(len(rows), dtype=torch.float64)
    assert off.abs().max() < 5 / math.sqrt(20_000)


def test_the_same_numbers_at_every_share():
    """A token that is left out at one share is left out at every larger one."""
    few, many = keep_tokens(4, 500, 0.2, seed(9), 2), keep_tokens(4, 500, 0.6, seed(9), 2)
    assert (few | ~many).all()
    assert (few & ~many).any()


def test_deterministic_and_the_same_for_views_of_the_seed():
    seeds = torch.arange(10)
    expected = keep_tokens(3, 50, 0.5, seed(4), 7)
    for view in (seeds[4:5], seeds[4], seeds[::2][2:3], seeds.view(5, 2)[2:3, :1], torch.tensor(4)):
        assert torch.equal(keep_tokens(3, 50, 0.5, view, 7), expected)


def test_fewer_rows_are_the_first_rows():
    assert torch.equal(keep_tokens(2, 31, 0.5, seed(1), 0), keep_tokens(5, 31, 0.5, seed(1), 0)[:2])
