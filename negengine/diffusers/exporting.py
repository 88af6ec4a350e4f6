"""Whether a program is being exported."""

import torch


def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which torch 2.11 takes to be true in all that it compiles."""
    return bool(torch.compiler._is_exporting_flag)
