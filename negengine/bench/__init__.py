"""Measuring what NegToMe costs: shapes of real models, rivals, and interleaved timing."""

from negengine.bench.interleave import Timing, interleave
from negengine.bench.rivals import gemm, lean, release
from negengine.bench.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape", "Timing", "gemm", "interleave", "lean", "release"]
