"""Who says what a picture shows: a person at the terminal, or a model. They know no pipeline.

A captioner is any function of a picture (RGB) that returns its caption. What a :class:`CaptionCache` keeps is told apart by the
captioner's ``identity``, a text; a function that is defined in a module has its name for one.
"""

from negengine.captioners.base import Captioner, CaptionError, NegativeImage, ask, identity
from negengine.captioners.cache import CaptionCache
from negengine.captioners.image_to_text import ImageToText
from negengine.captioners.person import Person

__all__ = ["CaptionCache", "CaptionError", "Captioner", "ImageToText", "NegativeImage", "Person", "ask", "identity"]
