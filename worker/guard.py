"""One run of a copied node, guarded: a provider's refusal ends the node at once and leaves it.

PocketFlow's nodes retry on every `Exception` and hand the last one to `exec_fallback`. So a refusal is
turned into a `BaseException` right around the node's own `exec`, where neither can get hold of it. Only
attributes of the copy are replaced, and only until its run has ended well; the user's graph stays as it is.

Not reached: the nodes inside a nested flow that runs as one node (PocketFlow copies them itself). A
refusal that leaves such a flow is recognised, but only after its nodes' own retries have called again,
and not if a fallback swallowed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pocketflow import AsyncNode, BatchNode, Flow

from worker.batch_guard import AsyncBatchGuard, BatchGuard
from worker.batch_items import digest_of
from worker.node_guard import AsyncFlowGuard, AsyncGuard, Guard
from worker.refused import Recognise, Refused

__all__ = ["Recognise", "Refused", "digest_of", "guard"]


def guard(
    node: Any,
    *,
    recognise: Recognise,
    returned: Mapping[int, Any] | None = None,
    items_digest: bytes | None = None,
) -> None:
    """Make the run of `node`, a copy nobody else uses and that runs once, raise `Refused` when refused.

    Wherever in the node that happens: prep, exec, fallback, post. In a batch node the items that had
    returned are remembered; in a parallel one the others are cancelled and awaited before `Refused`
    comes out. (An item that waits before its `exec`, at a gate of a subclass, ends when it gets there.)

    Args:
        recognise: asked about every exception; must not raise.
        returned, items_digest: of the `Refused` that ended an earlier run of this node. Those items are
            not called again if `prep` gives the same list, else all are.
    """
    _kind_of(node.__class__)(node, recognise, returned, items_digest)


@lru_cache(maxsize=1024)
def _kind_of(cls: type) -> type[Guard]:
    if issubclass(cls, AsyncNode):
        if issubclass(cls, BatchNode):
            return AsyncBatchGuard
        return AsyncFlowGuard if issubclass(cls, Flow) else AsyncGuard
    return BatchGuard if issubclass(cls, BatchNode) else Guard
