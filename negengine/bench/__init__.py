"""Measuring what NegToMe costs: shapes of real models, rivals, interleaved timing, floors, results and their plots."""

from negengine.bench.rivals import gemm, lean, release
from negengine.bench.shapes import SHAPES, Shape
from negengine.interleave import Timing, interleave, interleave_graphs

__all__ = ["SHAPES", "Shape", "Timing", "gemm", "interleave", "interleave_graphs", "lean", "release"]
