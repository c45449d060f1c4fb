"""The registry of streams and the one function that loads from it."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from driftlens.errors import ConfigError, nearest_name
from driftlens.registry import Registry
from driftlens.streams.types import Stream

__all__ = ["STREAMS", "StreamBuilder", "load_stream"]


class StreamBuilder(Protocol):
    """A function that builds a stream from keyword options."""

    def __call__(self, **options: Any) -> Stream:
        """Build the stream."""
        ...


STREAMS: Registry[Any] = Registry("stream", "driftlens.streams")
"""Stream builders by name; third parties add theirs through the entry-point group ``driftlens.streams``."""


def load_stream(name: str, **options: Any) -> Stream:
    """Build the stream that is registered as ``name``.

    Args:
        name: a name of :data:`STREAMS`, for example ``"builtin"`` or ``"toy"``.
        **options: options of that stream's builder.

    Raises:
        UnknownNameError: no such stream, or a task it does not have.
        ConfigError: an option that the stream does not know.
    """
    builder: StreamBuilder = STREAMS.get(name)
    allowed = inspect.signature(builder).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in allowed.values()):
        for option in options:
            if option not in allowed:
                guess = nearest_name(option, list(allowed))
                hint = f" Did you mean {guess!r}?" if guess else ""
                raise ConfigError(f"Stream {name!r} has no option {option!r}.{hint} Known: {', '.join(allowed)}.")
    return builder(**options)
