from __future__ import annotations

from torch import Tensor


def drop_path(branch: Tensor, probability: float, training: bool) -> Tensor:
    """Leaves a residual branch out for some samples in training, and scales it up for the others.

    Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """
    if not training or probability == 0:
        return branch
    keep = 1 - probability
    return branch * branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


def check_drop_path(block: str, probability: float) -> float:
    if not 0 <= probability < 1:
        raise ValueError(f"{block}: expected drop_path from 0 to below 1, got {probability}")
    return probability
