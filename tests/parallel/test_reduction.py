"""The tree sum against one that is written down as a recursion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddpm_dist.parallel.environment import read_environment
from ddpm_dist.parallel.ranks import Ranks
from ddpm_dist.parallel.reduction import TreeReduction


def one_rank() -> Ranks:
    return Ranks(read_environment({}), torch.device("cpu"), 30.0, lambda: False)


def tree(leaves: list[Tensor], group_size: int) -> Tensor:
    """Groups of neighbours one after the other, then halves."""
    if len(leaves) == group_size:
        total = leaves[0].clone()
        for leaf in leaves[1:]:
            total = total + leaf
        return total
    middle = len(leaves) // 2
    return tree(leaves[:middle], group_size) + tree(leaves[middle:], group_size)


@pytest.mark.parametrize(("shards", "group_size"), [(1, 1), (2, 1), (3, 3), (4, 1), (8, 1), (12, 3), (20, 5), (64, 1)])
def test_gradients_are_added_in_the_tree(shards: int, group_size: int) -> None:
    torch.manual_seed(0)
    module = nn.Linear(50, 40)
    reduction = TreeReduction(module, module.parameters(), one_rank(), shards)
    inputs = torch.randn(shards, 16, 50) * torch.logspace(0, 1, shards)[:, None, None]  # so that order shows
    alone = []
    for x in inputs:
        loss = module(x).square().mean() * reduction.loss_weight
        alone.append(torch.autograd.grad(loss, [module.weight, module.bias]))
    for _ in range(2):  # nothing of the first step is left in the second
        for shard, x in enumerate(inputs):
            with reduction.micro_batch(last=shard == shards - 1):
                (module(x).square().mean() * reduction.loss_weight).backward()
        expected_weight, expected_bias = (
            tree([gradients[place] for gradients in alone], group_size) for place in range(2)
        )
        assert module.weight.grad is not None
        assert module.bias.grad is not None
        assert torch.equal(module.weight.grad, expected_weight)
        assert torch.equal(module.bias.grad, expected_bias)
        if shards > group_size > 1 or (shards > 2 and group_size == 1):
            one_after_the_other = tree([gradients[0] for gradients in alone], shards)
            assert not torch.equal(one_after_the_other, expected_weight), "order does not show: this could not fail"
        module.zero_grad()


def test_a_weight_without_gradient_is_an_error_at_once() -> None:
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    reduction = TreeReduction(module, module.parameters(), one_rank(), 2)
    with pytest.raises(AssertionError, match="without a gradient"), reduction.micro_batch(last=False):
        module[0](torch.ones(1, 2)).sum().backward()
