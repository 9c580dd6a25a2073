"""Where a run stands and what it has changed, so that it goes on there instead of paying again."""

from __future__ import annotations

import logging
from collections import deque
from hashlib import blake2b
from typing import Any

import msgspec
from pocketflow import Flow

from worker.contract import FleetFlow
from worker.difference import apply, difference, is_plain
from worker.refused import Refused
from worker.registry import ServedFlow
from worker.walk import Level, NodeStep, Start, way_to

log = logging.getLogger("pocketfleet.worker")

MOST_BYTES = 16 * 1024 * 1024
"""A larger checkpoint is not written: the run goes on from the one before it."""


class Checkpoint(msgspec.Struct, omit_defaults=True):
    """A run between two nodes.

    Attributes:
        path, levels, after: where it goes on, see `worker.walk.Start`; an empty path starts over.
        graph: `Saver.graph` of the flow it was made with.
        difference: what the run changed in the shared store so far.
        entries: entries of the store that the flow saved its own way (`save_entry`).
        params: its params, as nodes changed them in place; None = as the job brought them.
        returned, items_digest: of a refused batch node, see `worker.guard`.
        refused_at: when it was first refused, seconds on Redis' clock; 0 = never.
        forgiven_s: seconds of that in which the fleet was asked to pause.
        died_alone: how often a process died in which the run was alone.
    """

    path: tuple[tuple[Any, ...], ...] = ()
    levels: list[tuple[dict[Any, Any], Any]] = []
    after: list[Any] | None = None
    graph: bytes = b""
    difference: dict[Any, Any] = {}
    entries: dict[Any, Any] = {}
    params: dict[Any, Any] | None = None
    returned: dict[int, Any] = {}
    items_digest: bytes | None = None
    refused_at: float = 0.0
    forgiven_s: float = 0.0
    died_alone: int = 0

    def with_counts_of(self, other: Checkpoint) -> Checkpoint:
        """Itself, with what `other` counted."""
        self.refused_at, self.forgiven_s = other.refused_at, other.forgiven_s
        self.died_alone = other.died_alone
        return self

    def refused_again(self, now_s: float, forgiven_s: float) -> Checkpoint:
        """A copy that counts one more refusal."""
        first_s = self.refused_at or now_s
        return msgspec.structs.replace(self, refused_at=first_s, forgiven_s=self.forgiven_s + forgiven_s)

    def refused(self, refused: Refused | None) -> Checkpoint:
        """Itself, with what a refused batch node had already returned."""
        self.returned = dict(refused.returned) if refused else {}
        self.items_digest = refused.items_digest if refused else None
        return self


encode_checkpoint = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Checkpoint)


def read_checkpoint(data: bytes) -> Checkpoint | None:
    """What `encode_checkpoint` wrote; None for what cannot be read (the run starts over)."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None


class CannotSave(Exception):
    """Something of the run cannot travel. Its text names it and the mend."""


class Saver:
    """What a worker knows of a flow in order to save its runs. Made before any run may change the graph.

    Attributes:
        saves: whether runs are saved after each node.
        graph: 8 bytes that change with the graph: its nodes' classes and what leads to what.
    """

    def __init__(self, served: ServedFlow) -> None:
        nodes = _listed(served.flow)
        self.flow = served.flow
        self.name = served.name
        self.saves = bool(served.flow.checkpoint) and len(nodes) > 1
        self.graph = blake2b(repr(nodes).encode("utf-8", "backslashreplace"), digest_size=8).digest()
        self._local = frozenset(served.flow.local_keys)
        self._ways: dict[tuple[int, int], tuple[Any, Any, tuple[Any, ...]]] = {}
        self._warned = False

    def fresh(self) -> Checkpoint:
        """A run that has not begun."""
        return Checkpoint(((),), graph=self.graph)

    def written(
        self, step: NodeStep, base: dict[Any, Any], shared: dict[Any, Any], params: dict[str, Any] | None
    ) -> Checkpoint:
        """The checkpoint of a run that is about to do `step`; it shares its values with the run.

        Args:
            params: what the job brought; params equal to it are left out.

        Raises:
            CannotSave: an entry of the store, a param or an action cannot travel.
        """
        kept = Checkpoint(self._path(step), graph=self.graph)
        if self._local:
            shared = {key: value for key, value in shared.items() if key not in self._local}
        kept.difference, left_behind = difference(base, shared)
        if left_behind:
            kept.difference, kept.entries = self._packed(base, shared)
        theirs, flows = step.params, self.flow.params
        if params is None or theirs != {**flows, **params}:
            if flows:  # what every worker's flow has may be anything, and need not travel
                theirs = {
                    key: value for key, value in theirs.items() if key not in flows or flows[key] is not value
                }
            kept.params = _travelling(theirs, "params")
        if step.parent is not None or step.part == "post":
            kept.levels = [tuple(level) for level in step.levels]
            _travelling(kept.levels, f"what the prep of a flow around {step.name} returned")
        if step.part == "post":
            kept.after = [_travelling(step.action, f"the action that leads to the post of {step.name}")]
        return kept

    def start_of(self, kept: Checkpoint) -> Start | None:
        """Where the run goes on, or None if the graph is no longer the one it was."""
        if kept.graph != self.graph:
            return None
        return Start(
            kept.path,
            [Level(params, prepared) for params, prepared in kept.levels],
            None if kept.after is None else (kept.after[0],),
        )

    def restore(self, base: dict[Any, Any], kept: Checkpoint) -> None:
        """Put what the run had changed into `base`, in place."""
        apply(base, kept.difference)
        for key, saved in kept.entries.items():
            base[key] = self.flow.load_entry(key, saved)

    def warn(self, why: str) -> None:
        """Say once per flow why its runs are not saved."""
        if not self._warned:
            self._warned = True
            log.warning(
                "checkpoint.not_written flow=%s: %s; such runs go on, but one that is stopped resumes at its "
                "last checkpoint. Leave the entry out with local_keys= and make it where it is missing, or "
                "give the flow save_entry and load_entry",
                self.name,
                why,
            )

    def _path(self, step: NodeStep) -> tuple[tuple[Any, ...], ...]:
        ways: list[tuple[Any, ...]] = []
        here: NodeStep | None = step
        while here is not None:
            ways.append(self._way(here))
            here = here.parent
        return tuple(ways[::-1])

    def _way(self, step: NodeStep) -> tuple[Any, ...]:
        start = step.flow.start_node
        known = self._ways.get((id(start), id(step.origin)))
        if known is not None and known[0] is start and known[1] is step.origin:
            return known[2]
        way = way_to(step.origin, start)
        if way is None:
            raise CannotSave(f"no successor leads to {step.name}")
        _travelling(way, f"an action on the way to {step.name}")
        self._ways[id(start), id(step.origin)] = (start, step.origin, way)
        return way

    def _packed(self, base: dict[Any, Any], shared: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
        """The store's difference without the entries that the flow saves its own way, and these."""
        plain: dict[Any, Any] = {}
        packed: dict[Any, Any] = {}
        for key, value in shared.items():
            _, left_behind = difference({key: base[key]} if key in base else {}, {key: value})
            if not left_behind:
                plain[key] = value
                continue
            saved = self.flow.save_entry(key, value)
            if saved is NotImplemented:
                raise CannotSave(
                    f"{left_behind[0]} in the shared store cannot travel (a {type(value).__name__})"
                )
            packed[key] = _travelling(saved, f"what save_entry({key!r:.80}) returned")
        return difference(base, plain)[0], packed


def _travelling(value: Any, what: str) -> Any:
    """`value`, if it comes back as it is (a tuple as a list)."""
    if not is_plain(value):
        raise CannotSave(f"{what} cannot travel")
    return value


def _listed(flow: FleetFlow, inside: tuple[int, ...] = ()) -> list[Any]:
    """Every node of the graph, nearest first: its class, its actions and the numbers they lead to."""
    line: deque[Any] = deque([flow.start_node])
    numbers: dict[int, int] = {id(flow.start_node): 0}
    nodes: list[Any] = []
    while line:
        node = line.popleft()
        leads: list[tuple[str, int]] = []
        for action, after in node.successors.items():
            if after is None:
                continue
            if id(after) not in numbers:
                numbers[id(after)] = len(numbers)
                line.append(after)
            leads.append((repr(action), numbers[id(after)]))
        nested = isinstance(node, Flow) and node.start_node is not None and id(node) not in inside
        inner = _listed(node, (*inside, id(node))) if nested else []
        nodes.append((type(node).__qualname__, leads))
        if inner:
            nodes.append(inner)
    return nodes
