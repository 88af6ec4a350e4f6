"""The mathematics in plain PyTorch: the oracle of the tests when run in float64, one file for each family of operators."""

from negengine.reference.negtome import (
    EPS,
    MATCHINGS,
    MODES,
    cosine,
    draw_keep,
    group_references,
    group_rows,
    is_disjoint,
    match,
    merge,
    negtome,
    negtome_batch,
)

__all__ = [
    "EPS", "MATCHINGS", "MODES", "cosine", "draw_keep", "group_references", "group_rows", "is_disjoint", "match", "merge",
    "negtome", "negtome_batch",
]  # fmt: skip
