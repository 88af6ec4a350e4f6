"""Settings as plain data (what JSON and YAML can hold) and back."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from negengine.methods import KINDS
from negengine.methods.bank import ReferenceBank
from negengine.methods.base import Method
from negengine.methods.negtome import ReferenceImage

if TYPE_CHECKING:
    from PIL import Image

_ENDLESS = ("guidance-interval.high",)  # settings that may be infinite: null in plain data
_PICTURE = ("image", "mask", "noise")


def as_plain(method: Method) -> dict[str, Any]:
    """All settings of a method, its short name first: ``{"method": "cads", "tau1": 0.6, ...}``.

    Tuples become lists; a :class:`ReferenceImage` becomes ``{"image": path, "mask": path or None, "noise": bool}``, with the paths
    from which its pictures were opened, as they were given; a :class:`ReferenceBank` becomes ``{"bank": path}``. The end of an
    endless guidance interval becomes None, because strict JSON has no infinity.

    Raises:
        TypeError: no method, or a setting that plain data cannot say (embeddings, a function).
        ValueError: a picture that was not opened from a file.
    """
    if not isinstance(method, Method):
        raise TypeError(f"settings of a method are needed, one of {', '.join(KINDS)}; got {method!r}")
    fields = (field.name for field in dataclasses.fields(method))
    return {"method": method.name} | {name: _plain(f"{method.name}.{name}", getattr(method, name)) for name in fields}


def from_plain(settings: Mapping[str, Any]) -> Method:
    """The method that :func:`as_plain` described. What is left out has its default; pictures are opened from their paths;
    the end of a guidance interval may be None or ``"inf"``.

    Raises:
        TypeError: no mapping. ValueError: no method or an unknown one, an unknown or a missing setting.
        OSError: a picture cannot be opened. And what the method raises for a setting that cannot work.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f'settings must be a mapping such as {{"method": "cads"}}, got {settings!r}')
    if "method" not in settings:
        raise ValueError(f'settings need "method", one of {", ".join(KINDS)}; there are {", ".join(map(str, settings)) or "none"}')
    name = settings["method"]
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(KINDS)}")
    fields = dataclasses.fields(KINDS[name])
    given = {key: value for key, value in settings.items() if key != "method"}
    _known(name, given, [field.name for field in fields])
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    return KINDS[name](**{key: _value(f"{name}.{key}", value) for key, value in given.items()})


def read_settings(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping in a ``.json``, ``.yaml`` or ``.yml`` file (UTF-8).

    Raises:
        ValueError: another ending, a file that does not parse, or one that holds no mapping. OSError: it cannot be read.
        ModuleNotFoundError: YAML without PyYAML.
    """
    file = Path(path)
    parsers: dict[str, Callable[[str], Any]] = {".json": json.loads, ".yaml": _yaml, ".yml": _yaml}
    parse = parsers.get(file.suffix.lower())
    if parse is None:
        raise ValueError(f"settings are read from .json, .yaml or .yml, got {file}")
    text = file.read_text(encoding="utf-8")
    try:
        settings = parse(text)
    except ValueError as error:
        raise ValueError(f"{file} does not parse: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{file} must hold a mapping (names and values), got {type(settings).__name__}")
    return settings


def _known(what: str, given: Mapping[str, Any], known: list[str] | tuple[str, ...]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{what} has no setting {', '.join(map(repr, unknown))}; there are {', '.join(known)}")


def _plain(name: str, value: object) -> Any:
    if name in _ENDLESS and value == math.inf:
        return None
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, tuple):
        return [_plain(name, v) for v in value]
    if isinstance(value, ReferenceImage):
        mask = None if value.mask is None else _path(f"the mask of {name}", value.mask)
        return {"image": _path(f"the picture of {name}", value.image), "mask": mask, "noise": value.noise}
    if isinstance(value, ReferenceBank):
        return {"bank": str(value.path)}
    hint = "a function cannot be written down; give numbers" if callable(value) else "give its text"
    raise TypeError(f"{name} is {type(value).__name__}, which plain data cannot say: {hint}")


def _path(name: str, picture: Image.Image) -> str:
    path = getattr(picture, "filename", None)
    if not path:
        raise ValueError(f"{name} was not opened from a file; save it and open it: PIL.Image.open(path)")
    return os.fsdecode(path)


def _value(name: str, value: object) -> object:
    if isinstance(value, Mapping):
        return _reference(name, value)
    if name in _ENDLESS and (value is None or (isinstance(value, str) and value.lower() in ("inf", "infinity"))):
        return math.inf
    return tuple(_value(name, v) for v in value) if isinstance(value, list) else value


def _reference(name: str, value: Mapping[str, Any]) -> ReferenceImage | ReferenceBank:
    if "bank" in value:
        _known(f"a bank ({name})", value, ("bank",))
        return ReferenceBank(value["bank"])
    _known(f"a picture ({name})", value, _PICTURE)
    if "image" not in value:
        raise ValueError(f'a picture ({name}) needs "image", the path of its file')
    mask = value.get("mask")
    return ReferenceImage(_open(value["image"]), None if mask is None else _open(mask), value.get("noise", True))


def _open(path: str) -> Image.Image:
    from PIL import Image  # settings without a picture need no Pillow

    picture = Image.open(path)
    picture.load()  # closes the file
    return picture


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("YAML needs PyYAML: pip install pyyaml, or write JSON", name="yaml") from error

    class Loader(yaml.SafeLoader):
        """PyYAML reads 1e-6 as text (YAML 1.1 wants a point in a number); YAML 1.2 and people read a number."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
