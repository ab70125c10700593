"""Draws depend on (purpose, slot) alone, not on how slots are dealt to processes and micro-batches."""

import torch

from nitro_e.randomness import BLOCK, SampleRandom, seed_of


def test_any_split_of_the_slots_gives_the_same_numbers():
    def draw(first, count):
        rng = SampleRandom(0, "stage", 7, first=first, count=count)
        return rng.normal(3), rng.uniform()

    whole = draw(0, 100)
    for cuts in ([0, 100], [0, 32, 64, 100], [0, 5, 31, 33, 97, 100]):
        parts = [draw(low, high - low) for low, high in zip(cuts[:-1], cuts[1:])]
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_purposes_and_calls_are_independent():
    a, b = SampleRandom(0, 1, first=0, count=4 * BLOCK), SampleRandom(0, 2, first=0, count=4 * BLOCK)
    first, second, other = a.normal(100), a.normal(100), b.normal(100)
    for x, y in ((first, second), (first, other), (first[:BLOCK], first[BLOCK : 2 * BLOCK])):
        correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs()
        assert correlation < 5 / x.numel() ** 0.5
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert seed_of(1, 23) != seed_of(12, 3)
