"""Who is searched against whom, as the device reads it from the table of references.

One int32 tensor, ``[1 + 2 B + 2 B K]``: how many images have a reference; these images, in order; how many references each
image has; of each image the slots of the table that hold them, and the references themselves. Entries that name no image of
the bank count as absent, so a wrong table can neither read foreign memory nor change anything.
"""

from __future__ import annotations

import triton
import triton.language as tl


def length(B: int, K: int) -> int:
    """Entries of the schedule of ``B`` images with ``K`` slots each."""
    return 1 + 2 * B + 2 * B * K


@triton.jit
def updated_images(schedule):
    """How many images have a reference, and so will be written."""
    return tl.load(schedule)


@triton.jit
def updated_image(schedule, number):
    return tl.load(schedule + 1 + number)


@triton.jit
def reference_count(schedule, image, B):
    return tl.load(schedule + 1 + B + image)


@triton.jit
def slot_of(schedule, image, number, B, K):
    """The slot of an image's reference of this number."""
    return tl.load(schedule + 1 + 2 * B + image * K + number)


@triton.jit
def reference_of(schedule, image, number, B, K):
    """The image of the bank that an image's reference of this number is."""
    return tl.load(schedule + 1 + 2 * B + B * K + image * K + number)


@triton.jit
def names(reference, R):
    """Whether an entry of the table names an image of the bank."""
    return (reference >= 0) & (reference < R)


@triton.jit
def is_updated(references, image, K, R):
    """Whether an image has a reference, by the table itself."""
    found = 0
    for slot in range(K):
        found |= names(tl.load(references + image * K + slot), R).to(tl.int32)
    return found > 0


@triton.jit
def is_referenced(references, image, entries):
    """Whether an image of the bank is anyone's reference, by the table itself."""
    found = 0
    for start in range(0, entries, 128):
        entry = start + tl.arange(0, 128)
        found |= tl.max((tl.load(references + entry, mask=entry < entries, other=-1) == image).to(tl.int32), 0)
    return found > 0


@triton.jit
def write_schedule(schedule, references, B, K, R):
    """Make the schedule from the table; one program does."""
    seen = 0
    for start in range(0, B, 128):
        b = start + tl.arange(0, 128)
        count = tl.zeros([128], tl.int32)
        for slot in range(K):
            reference = tl.load(references + b * K + slot, mask=b < B, other=-1)
            named = names(reference, R)
            at = 1 + 2 * B + b * K + count
            tl.store(schedule + at, tl.zeros([128], tl.int32) + slot, mask=named)
            tl.store(schedule + B * K + at, reference, mask=named)
            count += named.to(tl.int32)
        tl.store(schedule + 1 + B + b, count, mask=b < B)
        has = (count > 0).to(tl.int32)
        tl.store(schedule + seen + tl.cumsum(has, 0), b, mask=has > 0)
        seen += tl.sum(has, 0)
    tl.store(schedule, seen)
