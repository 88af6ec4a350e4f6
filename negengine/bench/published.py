"""The published algorithm behind the engine's own plug-in, so that both work in the same places at the same times."""

from __future__ import annotations

import dataclasses

from negengine.bench import rivals
from negengine.kernels.call import Call
from negengine.ops import Backend, registry


def published_backend(group_size: int, alpha: float, threshold: float) -> Backend:
    """A backend, not registered, that runs :func:`negengine.bench.rivals.release` on each group, whose image 0 is the reference.

    The published code knows its settings as numbers of Python; so does this, and it leaves those of the call alone. It writes over
    its input in the last step of the algorithm, at no cost of its own. No mask, no dropout, no statistics.
    """

    def run(call: Call) -> None:
        x, y, K = call.x, call.y, call.references.shape[1]
        if call.bank is not x or K != 1 or call.keep is not None or call.mask is not None or len(x) % group_size:
            raise NotImplementedError("the published algorithm knows groups whose first image is the reference, no more")
        for source, target in zip(x.split(group_size), y.split(group_size), strict=True):
            rivals.release(source, alpha, threshold, call.matching, out=target)

    name = f"published, groups of {group_size}, alpha {alpha:g}, threshold {threshold:g}"
    return dataclasses.replace(registry._BACKENDS["torch"], name=name, run=run)
