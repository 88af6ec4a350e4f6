"""A head start for text encoders: they learn which class a prompt names before a denoiser learns to listen to them.

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

STEPS, BATCH, LR = 300, 128, 2e-3


def class_of(prompt: str) -> int:
    """The class that a prompt names, ``CLASSES`` if it leaves it open."""
    words = prompt.split()
    named = [i for i, word in enumerate(WORDS) if word in words or str(i) in words]
    return named[0] if named else CLASSES


def teach(
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    parameters: Iterable[nn.Parameter],
    draw: Callable[[int, torch.Generator], tuple[Tensor, list[str]]],
    seed: int,
    steps: int = STEPS,
) -> float:
    """Train ``encode`` to tell the classes apart, by its pooled output and by the mean of its states.

    Args:
        encode: prompts -> states ``[B, L, D]`` and pooled ``[B, P]``. parameters: those behind it.
        draw: random prompts, as second result. seed: of everything random.

    Returns:
        the last batch's accuracy of the pooled output.
    """
    generator = torch.Generator().manual_seed(seed)
    states, pooled = encode([""])
    torch.manual_seed(seed)
    heads = nn.ModuleList([nn.Linear(states.shape[-1], CLASSES + 1), nn.Linear(pooled.shape[-1], CLASSES + 1)])
    optimizer = torch.optim.AdamW([*parameters, *heads.parameters()], lr=LR)
    right = torch.zeros(())
    for _ in range(steps):
        _, prompts = draw(BATCH, generator)
        classes = torch.tensor([class_of(prompt) for prompt in prompts])
        states, pooled = encode(prompts)
        by_states, by_pooled = heads[0](states.mean(1)), heads[1](pooled)
        optimizer.zero_grad()
        (F.cross_entropy(by_states, classes) + F.cross_entropy(by_pooled, classes)).backward()
        optimizer.step()
        right = (by_pooled.argmax(-1) == classes).double().mean()
    optimizer.zero_grad()  # a gradient left behind would join the first step of the training that follows
    return float(right)
