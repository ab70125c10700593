"""Batches that are made before they are asked for: the same, in the same order, an error in its turn."""

import pytest
import torch

from nitro_e.interfaces import TextEmbedding
from nitro_e.stages.batches import ahead, tensors_of
from nitro_e.stages.distill.inputs import DistillBatch

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_items_come_in_order_and_so_many_are_made_before(count):
    made = []

    def making():
        for number in range(6):
            made.append(number)
            yield number

    for number in (stream := ahead(making(), count, CPU)):
        assert made == list(range(min(number + count + 1, 6)))
    assert number == 5 and next(stream, None) is None


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_comes_after_the_items_before_it(count):
    def making():
        yield from range(3)
        raise OSError("a shard is gone")

    stream, got = ahead(making(), count, CPU), []
    with pytest.raises(OSError, match="a shard is gone"):
        for number in stream:
            got.append(number)
    assert got == [0, 1, 2]


def test_all_tensors_of_a_batch_are_known():
    """Those in memory of another stream must be kept for the training step."""
    text = TextEmbedding(torch.zeros(1), torch.ones(1))
    batch = DistillBatch(0, torch.zeros(2), None, text, ["a"], ["b"])
    found = list(tensors_of(batch))
    assert [id(tensor) for tensor in found] == [id(batch.latents), id(text.tokens), id(text.mask)]
