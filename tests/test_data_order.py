"""The order: exact epochs, exact quotas, no memory."""

import pickle
from fractions import Fraction

import numpy as np
import pytest

from nitro_e.config import ConfigError
from nitro_e.data.order import BLOCK, Order, quotas


@pytest.mark.parametrize("case", range(60))
def test_every_epoch_holds_every_sample_once(case):
    rng = np.random.default_rng(case)
    sizes = [rng.integers(0, rng.integers(2, 300), rng.integers(1, 40)) for _ in range(rng.integers(1, 4))]
    sizes[0][0] += 1
    order = Order(sizes, seed=case, stage="s", window=int(rng.integers(1, 9)))
    n = int(sum(source.sum() for source in sizes))
    start = n * int(rng.integers(0, 10**6))
    for epoch in (0, 1):
        ids = order.ids(range(start + epoch * n, start + (epoch + 1) * n))
        assert sorted(ids.tolist()) == list(range(n))


@pytest.mark.parametrize("case", range(20))
def test_weighted_mixture_has_exact_quotas_and_exact_epochs(case):
    rng = np.random.default_rng(case)
    sizes = [rng.integers(1, 30, rng.integers(1, 20)) for _ in range(3)]
    weights = rng.uniform(0.2, 1, 3)
    weights[case % 3] *= case % 2  # half of the cases drop a source
    order = Order(sizes, weights, seed=case, stage="s", window=4)
    totals = [int(source.sum()) for source in sizes]
    edges = np.cumsum([0, *totals])
    start = BLOCK * int(rng.integers(0, 10**6))
    for k in range(3):
        ids = order.ids(range(start + k * BLOCK, start + (k + 1) * BLOCK))
        assert np.histogram(ids, edges)[0].tolist() == quotas(weights).tolist()
    ids = order.ids(range(0, 40 * BLOCK))
    for source in range(3):
        mine = ids[(ids >= edges[source]) & (ids < edges[source + 1])] - edges[source]
        assert len(mine) == 40 * quotas(weights)[source]
        for epoch in range(len(mine) // totals[source]):
            part = mine[epoch * totals[source] : (epoch + 1) * totals[source]]
            assert sorted(part.tolist()) == list(range(totals[source]))


def test_released_mixture():
    assert quotas([11.1, 4.4, 9.5]).tolist() == [227, 90, 195]
    assert quotas([0, 4.4, 9.5]).tolist() == [0, 162, 350]
    exact = [Fraction(1, 3)] * 3
    assert sorted(quotas(exact).tolist()) == [170, 171, 171]


def test_any_slice_of_positions_gives_the_same_ids():
    sizes = [[7, 5, 9], [20]]
    for weights in (None, [1, 2]):
        whole = Order(sizes, weights, seed=3, stage="a", window=2).ids(range(5000))
        order = Order(sizes, weights, seed=3, stage="a", window=2)
        rng = np.random.default_rng(0)
        for _ in range(30):
            start = int(rng.integers(0, 4900))
            np.testing.assert_array_equal(order.ids(range(start, start + 100)), whole[start : start + 100])
        scattered = rng.integers(0, 5000, 300)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).ids(scattered), whole[scattered])


def test_seed_stage_and_epoch_change_the_order():
    def ids(seed, stage, start=0):
        return Order([[50] * 4], seed=seed, stage=stage).ids(range(start, start + 200)).tolist()

    assert len({tuple(x) for x in (ids(0, "a"), ids(1, "a"), ids(0, "b"), ids(0, "a", 200))}) == 4


def test_order_is_frozen():
    """The values themselves: a run must resume in the same order on any machine and numpy version."""
    order = Order([[4, 3], [5]], [1, 1], seed=0, stage="pretrain", window=1)
    assert order.ids(range(12)).tolist() == [2, 1, 3, 8, 7, 0, 9, 10, 11, 7, 5, 10]
    assert order.ids(range(10**12, 10**12 + 4)).tolist() == [0, 9, 11, 8]


def test_windows_hold_whole_shards():
    """Within one epoch the samples of window w come before those of window w + 1."""
    order = Order([[10] * 12], seed=0, stage="s", window=3)
    shards = order.ids(range(120)) // 10
    windows = [set(shards[start : start + 30].tolist()) for start in range(0, 120, 30)]
    assert all(len(window) == 3 for window in windows) and set().union(*windows) == set(range(12))


def test_shuffle_is_uniform():
    """Over many epochs every sample stands at every place equally often (one window)."""
    counts = np.zeros((6, 6))
    order = Order([[4, 2]], seed=0, stage="s")
    for epoch in range(3000):
        counts[np.arange(6), order.ids(range(epoch * 6, epoch * 6 + 6))] += 1
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 50  # 25 degrees of freedom: mean 25, standard deviation 7


@pytest.mark.parametrize("weights", [[-1, 2], [0, 0], [float("nan"), 1], [1, 1e-6]])
def test_bad_weights(weights):
    with pytest.raises(ConfigError, match="weight"):
        quotas(weights)


def test_source_without_samples():
    with pytest.raises(ConfigError, match="no samples"):
        Order([[3], [0]], [1, 1], seed=0, stage="s")
