"""A head by its definition, for samples whose targets take several tokens."""

import torch

from minirec_pl.selection.probes.gradients import HeadStep


def drawn(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def several_steps():
    """Steps with biases, ids of unequal length and rows of W that several steps share; and log p by its definition."""
    n, width, temperature = 4, 5, 0.7
    weight, bias = drawn(0, 9, width), drawn(1, 9)
    rows = [torch.tensor([1, 4, 7]), torch.tensor([4, 2, 4, 8]), torch.tensor([3, 7])]
    targets = [[0, 2, 1, 1], [1, 3, -1, 0], [1, -1, -1, 0]]
    allowed = [drawn(2 + t, n, len(row)) > 0 for t, row in enumerate(rows)]
    allowed[1][:, 2] &= ~allowed[1][:, 0]  # a token leads to one child of a node at most
    for mask, target in zip(allowed, targets, strict=True):
        for b, place in enumerate(target):
            mask[b, place] |= place >= 0
    allowed[1][3] = torch.tensor([True, True, False, True])
    states = [drawn(20 + t, n, width) for t in range(3)]
    steps = [
        HeadStep(states[t], weight[rows[t]], torch.tensor(targets[t]), allowed[t], bias[rows[t]], temperature)
        for t in range(3)
    ]

    def logp(b, states, weight):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(3):
            if targets[t][b] >= 0:
                kept = [m for m in range(len(rows[t])) if allowed[t][b, m]]
                logits = (weight[rows[t][kept]] @ states[t][b] + bias[rows[t][kept]]) / temperature
                total = total + logits.log_softmax(dim=0)[kept.index(targets[t][b])]
        return total

    return steps, rows, weight, states, logp
