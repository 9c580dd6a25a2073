"""Where a run stopped and what it had changed, so that it goes on there instead of paying again."""

from __future__ import annotations

from typing import Any

import msgspec

from worker.contract import FleetFlow
from worker.difference import apply, difference
from worker.guard import Refused
from worker.walk import NodeStep, Path


class Checkpoint(msgspec.Struct, omit_defaults=True):
    """A stopped run.

    Attributes:
        path: per level of nesting the actions that lead to the node it goes on with.
        names: the classes of the nodes along that way, start and end included; a changed graph shows.
        difference: what the run changed in the shared store so far.
        params: its params, with changes that nodes made in place.
        returned, items_digest: of a refused batch node, see `worker.guard`.
        refused_at: when it was first refused, seconds on Redis' clock; 0 = never.
        forgiven_s: seconds of that in which the fleet was asked to pause.
    """

    path: list[list[Any]]
    names: list[list[str]]
    difference: dict[Any, Any] = {}
    params: dict[str, Any] = {}
    returned: dict[int, Any] = {}
    items_digest: bytes | None = None
    refused_at: float = 0.0
    forgiven_s: float = 0.0


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Checkpoint)


def read_checkpoint(data: bytes) -> Checkpoint | None:
    """What `written` wrote; None for nothing, or for what cannot be read (the run starts over)."""
    if not data:
        return None
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError:
        return None


def written(
    flow: FleetFlow,
    step: NodeStep,
    base: dict[Any, Any],
    shared: dict[Any, Any],
    params: dict[str, Any],
    refused: Refused | None,
    refused_at: float,
    forgiven_s: float,
) -> bytes:
    """The checkpoint of a run that stops at `step`.

    If something of it cannot travel only the times are kept, and the run starts over.
    """
    nothing = Checkpoint([], [], refused_at=refused_at, forgiven_s=forgiven_s)
    path = step.path
    changed, left_behind = difference(base, shared)
    if path is None or left_behind:
        return _encode(nothing)
    kept = Checkpoint(
        [list(way) for way in path],
        names_along(flow, path) or [],
        changed,
        params,
        dict(refused.returned) if refused else {},
        refused.items_digest if refused else None,
        refused_at,
        forgiven_s,
    )
    try:
        data = _encode(kept)
        return data if _decoder.decode(data) == kept else _encode(nothing)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return _encode(nothing)


def where_to_go_on(flow: FleetFlow, kept: Checkpoint) -> Path | None:
    """The path to start at, or None if there is none or the graph is no longer the one it was."""
    path = tuple(tuple(way) for way in kept.path)
    return path if path and names_along(flow, path) == kept.names else None


def store_of(base: dict[Any, Any], kept: Checkpoint) -> dict[Any, Any]:
    """The run's store as it was: `base` with the difference put into it, in place."""
    return apply(base, kept.difference)


def names_along(flow: Any, path: Path) -> list[list[str]] | None:
    """Class names of the nodes on the way, per level; None if the way leads nowhere."""
    names: list[list[str]] = []
    for way in path:
        node = getattr(flow, "start_node", None)
        if node is None:
            return None
        level = [type(node).__name__]
        for action in way:
            node = node.successors.get(action)
            if node is None:
                return None
            level.append(type(node).__name__)
        names.append(level)
        flow = node
    return names
