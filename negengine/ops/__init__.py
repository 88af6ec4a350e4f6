"""Torch operators of the engine. They know tensors and backends, no pipeline."""

from negengine.ops.dropout import keep_tokens
from negengine.ops.guidance import distances, evidence, guide, nag, nag_
from negengine.ops.negtome import match, negtome, negtome_
from negengine.ops.registry import Backend, backends, register_backend
from negengine.ops.verdicts import Verdict

from negengine.ops.establish import verify  # isort: skip  (asks the registered backends)

__all__ = [
    "Backend", "Verdict", "backends", "distances", "evidence", "guide", "keep_tokens", "match", "nag", "nag_", "negtome",
    "negtome_", "register_backend", "verify",
]  # fmt: skip
