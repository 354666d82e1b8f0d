"""The random source: no state, the same numbers for any split of a batch, and good enough by statistical tests."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from trainers.engine.run.randomness import SlotRandom, example_generator, mix, seed_network

SHAPE = (3, 8, 7)


def draws(slots, seed=0, stream="train"):
    rng = SlotRandom(seed, torch.as_tensor(slots), stream)
    return [
        rng.normal("noise", SHAPE),
        rng.uniform("u", (5,)),
        rng.integers("timestep", 1000),
        rng.bernoulli("dropout", 0.3),
        torch.stack([torch.randn(4, generator=generator) for generator in rng.generators()]),
    ]


def test_any_split_and_order_of_the_batch_draws_the_same_bits():
    whole = draws(range(12))
    parts = [torch.cat(pair) for pair in zip(draws(range(5)), draws(range(5, 12)), strict=True)]
    backwards = [values.flip(0) for values in draws(list(range(11, -1, -1)))]
    for expected, split, reversed_ in zip(whole, parts, backwards, strict=True):
        assert torch.equal(expected, split)
        assert torch.equal(expected, reversed_)


def test_seed_stream_slot_and_name_each_change_the_draw():
    reference = SlotRandom(0, torch.arange(4)).normal("noise", SHAPE)
    others = [
        SlotRandom(1, torch.arange(4)).normal("noise", SHAPE),
        SlotRandom(0, torch.arange(4), "validation").normal("noise", SHAPE),
        SlotRandom(0, torch.arange(4) + 4).normal("noise", SHAPE),
        SlotRandom(0, torch.arange(4)).normal("other", SHAPE),
    ]
    for other in others:
        assert (reference == other).sum() == 0


def test_asking_twice_for_one_name_is_an_error():
    rng = SlotRandom(0, torch.arange(2))
    rng.uniform("a")
    with pytest.raises(ValueError, match="'a' was asked for twice in one step"):
        rng.normal("a", (1,))


def test_splitmix64_against_its_published_first_outputs():
    """SplitMix64 seeded with 1234567: state advances by the golden ratio, each output is the mix of it."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    states = torch.tensor([1234567]) + torch.arange(1, 4) * golden
    assert [value % (1 << 64) for value in mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_distributions():
    rng = SlotRandom(3, torch.arange(1000))
    normal = rng.normal("n", (101,)).flatten().double()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(normal.numpy())) < 0.05
    uniform = rng.uniform("u", (100,)).flatten().double()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = torch.bincount(rng.integers("i", 50, (100,)).flatten(), minlength=50)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    share = SlotRandom(3, torch.arange(100_000)).bernoulli("b", 0.1).float().mean().item()
    assert abs(share - 0.1) < 4 * (0.09 / 100_000) ** 0.5


@pytest.mark.parametrize("what", ["neighbouring slots", "names", "elements", "halves"])
def test_no_correlation(what):
    """Over 100,000 pairs a correlation beyond 4 / sqrt(n) would be chance once in 16,000 times."""
    count = 400
    first = SlotRandom(0, torch.arange(count)).normal("a", (250,))
    other = {
        "neighbouring slots": lambda: SlotRandom(0, torch.arange(count) + 1).normal("a", (250,)),
        "names": lambda: SlotRandom(0, torch.arange(count)).normal("b", (250,)),
        "elements": lambda: first.roll(1, 1),
        "halves": lambda: first.roll(125, 1),  # the cosine and the sine of one Box-Muller pair
    }[what]()
    correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / (count * 250) ** 0.5
    # Box-Muller's halves share a radius: their squares must not be correlated either
    squares = torch.corrcoef(torch.stack([first.flatten() ** 2, other.flatten() ** 2]))[0, 1].item()
    assert abs(squares) < 4 / (count * 250) ** 0.5


def test_augmentation_and_dropout_seeds_are_keyed():
    first = [torch.rand(3, generator=example_generator(0, slot)) for slot in (0, 1, 0)]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    values = []
    for key in ((0, 5, 0), (0, 5, 1), (0, 5, 0)):
        seed_network(*key, torch.device("cpu"))
        values.append(torch.rand(3))
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])
