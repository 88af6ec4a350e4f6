"""What methods cost a whole pipeline: FLUX.1-dev and SDXL-base with random weights, embedded models, or checkpoints.

One pipeline serves all variants, since two of FLUX.1 do not fit one GPU: methods are put on and taken off between the loops. The
variants of one way to compile and one attention backend take turns, one loop each per round.
"""

from negengine.bench.whole.candidates import calibrated, variants
from negengine.bench.whole.measuring import Measured, cases, check_attention, groups, measure
from negengine.bench.whole.plan import check_loaded
from negengine.bench.whole.rehearsal import check, no_instruments, rehearse
from negengine.bench.whole.rows import case
from negengine.bench.whole.setting import COMPILED, METHODS, PUBLISHED, WITHOUT, Setting, Variant
from negengine.bench.whole.subjects import Made, Subject, checkpoint, made, subject
from negengine.bench.whole.tables import table

__all__ = [
    "COMPILED",
    "METHODS",
    "PUBLISHED",
    "WITHOUT",
    "Made",
    "Measured",
    "Setting",
    "Subject",
    "Variant",
    "calibrated",
    "case",
    "cases",
    "check",
    "check_attention",
    "check_loaded",
    "checkpoint",
    "groups",
    "made",
    "measure",
    "no_instruments",
    "rehearse",
    "subject",
    "table",
    "variants",
]
