"""A head start for text encoders: they learn what a prompt names before a denoiser learns to listen to them.

A random encoder tells prompts apart by a few per cent of its output, and a denoiser takes thousands of steps to notice. The
lesson takes seconds, as CLIP's own training precedes that of the models that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from negengine.models.digits import CLASSES
from negengine.models.prompts import WORDS
from negengine.models.world import Latents

STEPS, BATCH, LR = 300, 128, 2e-3


def class_of(prompt: str) -> int:
    """The class that a prompt names, ``CLASSES`` if it leaves it open."""
    words = prompt.split()
    named = [i for i, word in enumerate(WORDS) if word in words or str(i) in words]
    return named[0] if named else CLASSES


class Readers(nn.Module):
    """Two linear maps that read every attribute a prompt names, one from the mean of its states, one from its pooled state."""

    def __init__(self, data: Latents, states_width: int, pooled_width: int) -> None:
        super().__init__()
        self.named = data.named
        self.values = [number + 1 for number in data.world.attributes.values()]  # and one for an attribute that is left open
        total = sum(self.values)
        self.heads = nn.ModuleList([nn.Linear(states_width, total), nn.Linear(pooled_width, total)])

    def loss(self, states: Tensor, pooled: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of what both read, summed over the attributes, and the share that the pooled state gives right."""
        names = torch.tensor([self.named(prompt) for prompt in prompts]).unbind(1)
        by_states, by_pooled = (
            head(read).float().split(self.values, -1) for head, read in zip(self.heads, (states.mean(1), pooled), strict=True)
        )
        loss = torch.zeros(())
        right = torch.ones(len(prompts), dtype=torch.bool)
        for from_states, from_pooled, truth in zip(by_states, by_pooled, names, strict=True):
            loss = loss + F.cross_entropy(from_states, truth) + F.cross_entropy(from_pooled, truth)
            right &= from_pooled.argmax(-1) == truth
        return loss, right.double().mean()


def teach(
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    parameters: Iterable[nn.Parameter],
    data: Latents,
    seed: int,
    steps: int = STEPS,
) -> float:
    """Train ``encode`` to tell what prompts name, by its pooled output and by the mean of its states.

    Args:
        encode: prompts -> states ``[B, L, D]`` and pooled ``[B, P]``. parameters: those behind it.
        data: gives random prompts and what they name. seed: of everything random.

    Returns:
        the last batch's accuracy of the pooled output.
    """
    generator = torch.Generator().manual_seed(seed)
    states, pooled = encode([""])
    torch.manual_seed(seed)
    readers = Readers(data, states.shape[-1], pooled.shape[-1])
    optimizer = torch.optim.AdamW([*parameters, *readers.parameters()], lr=LR)
    right = torch.zeros(())
    for _ in range(steps):
        _, prompts = data.draw(BATCH, generator)
        states, pooled = encode(prompts)
        optimizer.zero_grad()
        loss, right = readers.loss(states, pooled, prompts)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # a gradient left behind would join the first step of the training that follows
    return float(right)
