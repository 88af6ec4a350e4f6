"""Denoisers under ``torch.compile``: that code of another set of methods is found or made, and other code is left alone."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from negengine.diffusers.families import Family
from negengine.diffusers.session import Session

ROOM = 8  # graphs of one function that methods may need when they are applied; as many as torch allows one by default
_blind: weakref.WeakSet[Any] = weakref.WeakSet()  # the guards of graphs that do not look for hooks


def prepare(target: Any, denoiser: nn.Module, family: Family) -> None:
    """Methods have been put on a denoiser, perhaps a compiled one.

    By default compiled code does not look whether a module has got hooks since; code that was made with
    ``skip_nnmodule_hook_guards`` off does, and is therefore kept beside that of other sets of methods. Only what was compiled
    before the first ``apply`` of the process is forgotten, which torch can do for the process as a whole alone. Torch gives up
    on a function of which it has ``recompile_limit`` graphs, so that there must be room for some more.
    """
    config = torch._dynamo.config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        _blind.update(graph.guard_manager for graph in _graphs())
    if is_compiled(target, denoiser, family):
        _make_room()
    for hook in (Session._enter, Session._leave):
        _leave_to_the_host(hook)


def _make_room() -> None:
    config, needed = torch._dynamo.config, most_graphs() + ROOM
    if any(graph.guard_manager in _blind for graph in _graphs()) or needed > config.accumulated_recompile_limit:
        torch.compiler.reset()
    elif needed > config.recompile_limit:
        config.recompile_limit = needed


def _leave_to_the_host(hook: Callable[..., Any]) -> None:
    """What torch calls before and after a compiled denoiser is no part of its graph, and would become graphs of a few nodes.

    Where the caller of the denoiser is compiled, or exported, hooks are a part of the graph as ever.
    """
    from torch._dynamo.types import FrameAction, FrameExecStrategy  # takes a second to import

    skip = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    torch._dynamo.eval_frame.set_code_exec_strategy(hook.__code__, skip)


def is_compiled(target: Any, denoiser: nn.Module, family: Family) -> bool:
    """Whether a denoiser, some of its blocks, or the pipeline's wrapper of it is compiled."""
    given = target if isinstance(target, nn.Module) else getattr(target, family.component)
    wrapped = given is not denoiser  # by torch.compile(module)
    return wrapped or any(module._compiled_call_impl is not None for module in denoiser.modules())


def most_graphs() -> int:
    """Of one function, among all that this process has compiled."""
    return max(map(len, _graphs_of_functions()), default=0)


def _graphs() -> Iterator[Any]:
    """All that there are now; what was forgotten is not among them, though others may hold it."""
    return itertools.chain.from_iterable(_graphs_of_functions())


def _graphs_of_functions() -> Iterator[list[Any]]:
    for reference in torch._dynamo.convert_frame.input_codes.seen:
        code = reference()
        if code is not None:
            yield torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
