"""What the papers print, where it could be read, to stand beside one's own numbers; and where it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A table of a paper. ``rows``: who -> numbers in the order of ``columns``."""

    title: str
    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    remark: str = ""


NEGTOME = Published(
    title="NegToMe, Table 1",
    source="arXiv 2412.01339 v1, as ai-paper-reviewer.com shows it",
    columns=("DreamSim ↓", "CLIPScore ↑", "IS ↑", "seconds an image ↓"),
    rows={
        "base prompt": ("0.812", "0.334", "3.197", "13.2"),
        "base prompt + NegToMe": ("0.780", "0.336", "3.355", "13.7"),
        "prompt rewriting (gpt-4o)": ("0.743", "0.332", "3.686", "15.4"),
        "prompt rewriting + NegToMe": ("0.712", "0.333", "3.747", "15.9"),
    },
    remark="That source captions this table 'Copyright Mitigation'; its rows are those of output diversity with prompt rewriting. "
    "DreamSim is the mean similarity within a group: 1 minus `distance:dreamsim`. Large models, other prompts: not to be compared "
    "digit by digit.",
)
COPYRIGHT = Published(
    title="NegToMe, copyright mitigation",
    source="arXiv 2412.01339, abstract",
    columns=("similarity to the asset",),
    rows={"NegToMe against none": ("-34.57 %",)},
    remark="The table behind this number could not be read.",
)


_DNP_COLUMNS = ("human: correctness", "human: quality", "hand: correctness", "hand: quality")
_DNP_SOURCE = "arXiv 2411.05473, supplement"
DNP = (
    Published(
        title="DNP, Table 3: captions by GPT-4V",
        source=_DNP_SOURCE,
        columns=_DNP_COLUMNS,
        rows={
            "no clear winner": ("16.74 %", "8.63 %", "11.88 %", "7.14 %"),
            "without": ("34.53 %", "32.32 %", "36.12 %", "34.71 %"),
            "dnp": ("48.74 %", "59.05 %", "52.0 %", "58.15 %"),
        },
    ),
    Published(
        title="DNP, Table 4: against negative prompts by GPT-3.5",
        source=_DNP_SOURCE,
        columns=_DNP_COLUMNS,
        rows={
            "no clear winner": ("16.44 %", "5.58 %", "11.84 %", "4.49 %"),
            "without": ("10.96 %", "10.78 %", "5.98 %", "7.03 %"),
            "GPT negative prompt": ("19.52 %", "21.75 %", "17.01 %", "19.01 %"),
            "dnp": ("53.08 %", "61.89 %", "65.17 %", "69.47 %"),
        },
    ),
    Published(
        title="DNP, Table 5: against random negative prompts",
        source=_DNP_SOURCE,
        columns=_DNP_COLUMNS,
        rows={
            "no clear winner": ("7.80 %", "6.08 %", "2.61 %", "1.37 %"),
            "without": ("16.46 %", "14.37 %", "19.77 %", "16.04 %"),
            "random": ("20.02 %", "22.57 %", "17.5 %", "18.77 %"),
            "dnp": ("55.73 %", "56.99 %", "60.11 %", "63.82 %"),
        },
    ),
    Published(
        title="DNP, Table 6: against a standard negative prompt",
        source=_DNP_SOURCE,
        columns=_DNP_COLUMNS,
        rows={
            "no clear winner": ("21.45 %", "6.69 %", "17.61 %", "7.73 %"),
            "without": ("18.31 %", "12.84 %", "19.69 %", "10.39 %"),
            "standard": ("28.14 %", "39.89 %", "16.36 %", "25.45 %"),
            "dnp": ("32.10 %", "40.57 %", "48.30 %", "56.02 %"),
        },
        remark="People chose there, of Stable Diffusion 1.4's pictures of humans and of hands; here the metrics choose.",
    ),
)

BESIDE: Mapping[str, tuple[Published, ...]] = {"diversity": (NEGTOME,), "asset": (COPYRIGHT,), "pairs": DNP}
"""Protocol -> what stands beside its numbers. Of DNG's paper no table could be read."""
