"""The methods of the papers, one file each: frozen, validated settings that know no pipeline."""

from negengine.methods.negtome import NegToMe, ReferenceImage

__all__ = ["NegToMe", "ReferenceImage"]
