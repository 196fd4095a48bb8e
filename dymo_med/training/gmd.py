"""Gradient-guided modality decoupling: one gradient per modality subset, conflicts projected out.

The losses of different subsets of modalities pull a network in different directions. Before their
gradients are reduced to one, each is projected, in a random order, off every gradient it
disagrees with. Every projected gradient is a linear combination of the original ones, so the
whole projection happens on the n x n matrix of their inner products; the long vectors are read
once for that matrix and once for the result.

References:
    Wang et al., Gradient-guided Modality Decoupling for Missing-Modality Robustness, AAAI 2024
    (published code: `optim/gmd.py`); Yu et al., Gradient Surgery for Multi-Task Learning,
    NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Reduction = Literal["mean", "sum"]

# Columns of flat gradients multiplied at once: their sums are then added in float64, and no
# temporary is longer.
_COLUMNS = 1 << 16


def gram_matrix(flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the inner products of flat gradients.

    Args:
        flat: `(n, P)`.
        dtype: Type of the products within a block of columns; None = that of `flat`. Sums over
            blocks are always in float64.

    Returns:
        Float64 `(n, n)` on the CPU.
    """
    total = flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    for block in flat.split(_COLUMNS, dim=1):
        part = block if dtype is None else block.to(dtype)
        total += part @ part.T
    return total.cpu()


def random_orders(objectives: int, generator: torch.Generator) -> Tensor:
    """Return the order in which each objective meets all, its own gradient included.

    Args:
        objectives: n.
        generator: CPU generator.

    Returns:
        Int64 `(n, n)`: row i is the order of objective i.
    """
    return torch.rand(objectives, objectives, generator=generator).argsort(dim=1)


def project(gram: Tensor, orders: Tensor) -> Tensor:
    """Return the projected gradients as combinations of the original ones.

    With g~_i = sum_j C_ij g_j, starting from g~_i = g_i: for every j in objective i's order, if
    g~_i . g_j < 0, then g~_i <- g~_i - (g~_i . g_j / |g_j|^2) g_j. Since g~_i . g_j = (C G)_ij,
    that is C_ij <- C_ij - (C G)_ij / G_jj.

    As in the published code a gradient also meets its own original (PCGrad leaves that out):
    after several projections the two can disagree. An order without the own index gives the
    other rule.

    Args:
        gram: `(n, n)`, G.
        orders: Int64 `(n, k)`: which gradients objective i meets, from first to last.

    Returns:
        Float64 `(n, n)`, C.
    """
    gram = gram.double()
    rows = torch.arange(len(gram))
    combination = torch.eye(len(gram), dtype=torch.float64)
    for j in orders.T:  # all objectives at once, each its own j
        dots = (combination * gram[j]).sum(1)
        lengths = gram[j, j]
        # A zero gradient has no negative product.
        combination[rows, j] -= torch.where(dots < 0, dots / lengths, 0.0)
    return combination


def merge_weights(combination: Tensor, reduction: Reduction = "mean") -> tuple[Tensor, Tensor]:
    """Return the weight of each original gradient in the merged one.

    Args:
        combination: `(n, n)`, C.
        reduction: How projected gradients of shared parameters are reduced; those of
            modality-specific ones are always summed.

    Returns:
        For shared and for modality-specific parameters, `(n,)` each.
    """
    specific = combination.sum(0)
    return (specific / len(combination) if reduction == "mean" else specific), specific


def shared_by_all(reached: Tensor) -> Tensor:
    """Return which parameters get a gradient from every objective that has one at all.

    Args:
        reached: Bool `(n, parameters)`: whether an objective's gradient has a parameter.

    Returns:
        Bool `(parameters,)`; the others are modality-specific.
    """
    shared: Tensor = reached[reached.any(1)].all(0)
    return shared


@dataclass(frozen=True)
class Decoupling:
    """How the gradients of several losses are merged.

    Attributes:
        objectives: n, the number of losses.
        specific: Parameters that one modality alone passes through; None = those that some
            objective of the batch does not reach, as in the published code. That depends on
            which modalities the patients of a batch have, so trainers name them.
        reduction: Of shared parameters.
        dtype: Of inner products; see `gram_matrix`.
    """

    objectives: int
    specific: Sequence[nn.Parameter] | None = None
    reduction: Reduction = "mean"
    dtype: torch.dtype | None = None


class ObjectiveGradients:
    """One flat gradient per objective, and the one they are merged into.

    A backward pass leaves each parameter's gradient in its place here as soon as it is complete,
    so besides these n flat gradients there is never more than one parameter's. The merged
    gradient overwrites the first of them and becomes the parameters' `grad`, until the next
    batch.

    Passes add up until `merge`: over the parts of a batch each objective's gradient is
    accumulated first, and projected once. For losses that are means over records that is the
    gradient of the whole batch.

    A common factor on all losses (loss scaling under mixed precision) is a common factor on the
    result, so it may be taken out afterwards as usual.

    Args:
        parameters: What is trained.
        rule: How to merge.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rule: Decoupling) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.rule = rule
        sizes = [p.numel() for p in self.parameters]
        first = self.parameters[0]
        self.flat = torch.zeros(rule.objectives, sum(sizes), dtype=first.dtype, device=first.device)
        self.reached = torch.zeros(rule.objectives, len(sizes), dtype=torch.bool)
        self._blocks = self.flat.split(sizes, dim=1)  # views, (n, size of a parameter)
        self._merged = False

    def backward(
        self,
        losses: Sequence[Tensor],
        share: float = 1.0,
        run: Callable[..., None] = torch.autograd.backward,
    ) -> None:
        """Add the gradient of each objective's loss.

        Args:
            losses: One scalar per objective; one that depends on no parameter adds nothing.
            share: Factor on the gradients, a part's share of its batch.
            run: Called with a loss and `retain_graph`; runs the backward pass.

        Raises:
            ValueError: If there are not as many losses as objectives.
        """
        if len(losses) != len(self.flat):
            raise ValueError(f"there must be {len(self.flat)} losses, got {len(losses)}.")
        if self._merged:
            self.reached.zero_()
            self._merged = False
            for p in self.parameters:
                p.grad = None
        objective = 0

        def keeper(index: int) -> Callable[[Tensor], None]:
            block, reached = self._blocks[index], self.reached[:, index].numpy()

            def keep(p: Tensor) -> None:
                gradient, p.grad = p.grad, None
                if gradient is None:
                    return
                if reached[objective]:
                    block[objective].add_(gradient.reshape(-1), alpha=share)
                else:
                    torch.mul(gradient.reshape(-1), share, out=block[objective])
                    reached[objective] = True

            return keep

        hooks = [
            p.register_post_accumulate_grad_hook(keeper(i)) for i, p in enumerate(self.parameters)
        ]
        try:
            left = [i for i, loss in enumerate(losses) if loss.requires_grad]
            for objective in left:
                # What subsets have in common was computed once, and is freed by the last.
                run(losses[objective], retain_graph=objective != left[-1])
        finally:
            for hook in hooks:
                hook.remove()

    def merge(self, generator: torch.Generator) -> Tensor:
        """Project, merge, and give every parameter that has a gradient its part of the result.

        Args:
            generator: CPU generator of the orders.

        Returns:
            Float64 `(n, n)`: C of `project`.
        """
        for index, block in enumerate(self._blocks):
            absent = (~self.reached[:, index]).nonzero().squeeze(1)
            if len(absent):
                block[absent.to(block.device)] = 0
        gram = gram_matrix(self.flat, self.rule.dtype)
        combination = project(gram, random_orders(len(gram), generator))
        weights = merge_weights(combination, self.rule.reduction)
        shared, specific = (w.to(self.flat) for w in weights)
        if self.rule.specific is None:
            is_shared = shared_by_all(self.reached).tolist()
        else:
            own = {id(p) for p in self.rule.specific}
            is_shared = [id(p) not in own for p in self.parameters]
        anywhere = self.reached.any(0).tolist()
        for index, (p, block) in enumerate(zip(self.parameters, self._blocks, strict=True)):
            if not anywhere[index]:  # as after a plain backward pass: no gradient, no step
                continue
            weight = shared if is_shared[index] else specific
            for columns in block.split(_COLUMNS, dim=1):
                columns[0] = weight @ columns
            p.grad = block[0].view_as(p)
        self._merged = True
        return combination
