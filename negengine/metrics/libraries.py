"""Packages and weights that some metrics need: asked for late, and missed in one clear sentence."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

FETCHING = ("download", "invalid hash", "were required", "offline")  # said by a RuntimeError of torch.hub or open_clip
LONGEST = 120  # characters of a reason


class MissingWeights(RuntimeError):
    """A model that judges is not on this machine and cannot be fetched; the message says how to get it."""


def need(module: str, package: str, what: str, extra: bool = True) -> ModuleType:
    """The module of an optional package.

    Args:
        extra: it is one of those that ``negengine[evaluate]`` brings.

    Raises:
        ImportError: it is not installed, or cannot be imported; says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        way = f"'negengine[evaluate]', or pip install {package}" if extra else package
        missing = package if _top(error.name or module) == _top(module) else f"{package}, and with it {error.name}"
        raise ImportError(f"{what} needs {missing}: pip install {way}") from error
    except (ImportError, RuntimeError) as error:  # torchvision of another build of torch raises RuntimeError
        raise ImportError(f"{what} needs {package}, which is installed but cannot be imported: {error}") from error


@contextmanager
def weights(what: str, how: str) -> Iterator[None]:
    """Around the loading of weights: what a failed download or a missing file raises becomes :class:`MissingWeights`, nothing else.

    Args:
        what: whose weights, as the beginning of a sentence. how: the way to get them, as its end.
    """
    quiet = logging.root.manager.disable
    logging.disable(logging.ERROR)  # of each try to fetch them; the error that follows says what there is to say
    try:
        yield
    except (OSError, RuntimeError) as error:  # of which the errors of urllib, torch.hub and the hub's client are some
        if isinstance(error, RuntimeError) and not any(word in str(error).lower() for word in FETCHING):
            raise  # too little memory, or weights of another form: they are here
        reason = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason if len(reason) <= LONGEST else f"{reason[:LONGEST].rstrip()} …"
        raise MissingWeights(f"the weights of {what} are not here and cannot be fetched ({reason}); {how}") from error
    finally:
        logging.disable(quiet)


def _top(module: str) -> str:
    return module.partition(".")[0]
