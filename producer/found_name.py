"""The name of a flow that was given none: where it is found, else what it is made of."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def found_name(flow: object) -> str | None:
    """The `module:attribute` under which a loaded module holds `flow`; a script counts as its file."""
    found = [
        (name, attribute)
        for name, module in list(sys.modules.items())
        for attribute, value in list(getattr(module, "__dict__", {}).items())
        if value is flow and not attribute.startswith("_")
    ]
    # the module that made it comes before those that import it, and the script that runs comes last
    found.sort(key=lambda place: (place[0] == "__main__", place[0] != type(flow).__module__))
    if not found:
        return None
    name, attribute = found[0]
    if name != "__main__":
        return f"{name}:{attribute}"
    path = getattr(sys.modules["__main__"], "__file__", None)
    return f"{_module_of(Path(path))}:{attribute}" if path else None


def made_name(flow: object, keywords: Sequence[tuple[str, Any]]) -> str:
    """Class and a digest of the keywords' values: for a flow that is found nowhere, in its own process."""
    kind = type(flow)
    text = f"{kind.__module__}.{kind.__qualname__}"
    values = repr([(key, repr(value)) for key, value in keywords if not callable(value)])
    digest = hashlib.blake2b(values.encode(), digest_size=6).hexdigest()
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:100] + "." + digest


def _module_of(path: Path) -> str:
    """The name under which another process would import a script: `python -m a.b` keeps its package."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return str(spec.name)
    return path.stem
