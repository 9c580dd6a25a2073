"""From a target such as `users:flow` to the flow it names. The only place that imports users' code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pocketflow import AsyncFlow, BaseNode, Flow

from limiter.errors import LimitsError
from limiter.limits import Limits
from limiter.printable import printable
from limiter.refusal import recognised
from worker.contract import FOUND_NAME, FleetFlow
from worker.errors import TargetError
from worker.refused import Recognise

OURS = ("pocketfleet", "worker", "limiter", "producer")
HOME = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ServedFlow:
    """A flow with the names under which the fleet knows it."""

    target: str
    name: str
    limits: Limits
    flow: FleetFlow

    @cached_property
    def recognise(self) -> Recognise:
        """Tells a refusal, as this flow wants it told."""
        return partial(recognised, overloaded=self.flow.overloaded, hook=self.flow.is_refusal)


def serve(targets: list[str], lease_s: float) -> list[ServedFlow]:
    """The flows that `targets` name.

    Raises:
        TargetError: one of them leads to no flow that could run.
        LimitsError: their limits or names cannot hold, or two flows give one limit different values.
    """
    served = [named(find_flow(target), target, lease_s) for target in dict.fromkeys(targets)]
    limits: dict[str, ServedFlow] = {}
    names: dict[str, ServedFlow] = {}
    for each in served:
        other = limits.setdefault(each.limits.name, each)
        if other.limits != each.limits:
            raise LimitsError(
                f"{other.target} and {each.target} give limit '{each.limits.name}' two different values; use one",
                key="limit",
                value=each.limits.name,
            )
        twin = names.setdefault(each.name, each)
        if twin is not each:
            raise TargetError(
                each.target, f"has the same name '{each.name}' as {twin.target}; give it a name="
            )
    return served


def named(flow: FleetFlow, target: str, lease_s: float) -> ServedFlow:
    """A flow found under `target`, with its names."""
    name = flow.fleet_name(target)
    return ServedFlow(target, name, flow.fleet_limits(name, lease_s), flow)


def find_flow(target: str) -> FleetFlow:
    """Import the module of `module:attribute` and return the flow, or what its factory makes."""
    if not FOUND_NAME.fullmatch(target) or ":" not in target:
        raise TargetError(target, "is not a target; write it as module:attribute, such as users:flow")
    module_name, _, attribute = target.partition(":")
    module = _import(target, module_name)
    found = getattr(module, attribute, None)
    if found is None:
        raise TargetError(target, f"module {module_name} has no '{attribute}'{_near(attribute, module)}")
    return checked_flow(_made(target, found), target, _near(attribute, module))


def checked_flow(found: Any, target: str, near: str = "") -> FleetFlow:
    """`found` if it is a flow that a fleet can run; `near` says what else may have been meant."""
    if not isinstance(found, Flow) or not hasattr(found, "fleet_limits"):
        other = "" if isinstance(found, BaseNode) else ", not a flow"
        raise TargetError(
            target,
            f"is {_some(type(found).__name__)}{other}; name a ThrottledAsyncParallelBatchFlow{near}",
        )
    if found.start_node is None:
        raise TargetError(target, f"{type(found).__name__} has no start node; make it with start={near}")
    if cast(Any, type(found))._orch_async is not AsyncFlow._orch_async:
        raise TargetError(
            target,
            f"{type(found).__name__} has an _orch_async of its own, and workers walk its graph without it; "
            "put that into a flow inside it",
        )
    return cast(FleetFlow, found)


def _some(kind: str) -> str:
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _made(target: str, found: Any) -> Any:
    """The flow itself, or what a zero-argument factory (or a flow class) returns."""
    if isinstance(found, BaseNode) or not callable(found):
        return found
    if inspect.iscoroutinefunction(found):
        raise TargetError(target, "is an async function; name a flow, or a factory that is not async")
    try:
        inspect.signature(found).bind()
    except TypeError:
        raise TargetError(target, "needs arguments; name a flow, or a factory that takes none") from None
    except ValueError:
        return found
    try:
        return found()
    except LimitsError:
        raise
    except Exception as error:
        raise TargetError(target, f"failed when it was called: {said(error)}") from error


def _import(target: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    check_shadows(target, name)
    _importing.append(target)
    try:
        return importlib.import_module(name)
    except LimitsError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(target, f"there is no module {error.name}{_near_file(target)}") from None
        raise TargetError(target, f"module {name} cannot be imported: {said(error)}") from error
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(target, f"module {name} cannot be imported: {said(error)}") from error
    finally:
        _importing.pop()


_importing: list[str] = []


def refuse_while_importing(call: str) -> None:
    """A module that runs its flow when it is imported would do so in every worker, and they again.

    Raises:
        TargetError: a target's module is being imported just now.
    """
    if _importing:
        raise TargetError(
            _importing[-1],
            f"its module calls {call} when imported; put that under if __name__ == '__main__':",
        )


def check_shadows(target: str, module: str = "") -> None:
    """Refuse a module of the user's own that is called like one of our rooms, whichever hides the other."""
    for room in OURS:
        for found in _found(room):
            if not _is_ours(Path(found).resolve()):
                raise TargetError(target, f"{found} has the name of PocketFleet's own '{room}'; rename it")
        if room != "pocketfleet" and _installed(room):
            raise TargetError(
                target,
                f"the installed package '{room}' has the name of PocketFleet's own; remove or rename it",
            )
    if module.split(".")[0] in OURS:
        raise TargetError(target, f"'{module.split('.')[0]}' is PocketFleet's own; name a module of yours")


def _found(room: str) -> Iterator[str]:
    """Every file that `import room` could mean, here or in a worker started in this directory."""
    loaded = getattr(sys.modules.get(room), "__file__", None)
    if loaded:
        yield loaded
    for entry in dict.fromkeys([*sys.path, str(Path.cwd())]):
        spec = PathFinder.find_spec(room, [entry])
        if spec and spec.origin:
            yield spec.origin


def _is_ours(found: Path) -> bool:
    """In this copy of PocketFleet, or in another one (a clone beside an installed wheel)."""
    beside = found.parent.parent
    return found.name == "__init__.py" and (beside == HOME or (beside / "pocketfleet/__init__.py").is_file())


def _installed(room: str) -> bool:
    """Whether a distribution called `room` brings a top-level module of that name."""
    try:
        files = distribution(room).files or []
    except PackageNotFoundError:
        return False
    return any(file.parts[0] in (room, f"{room}.py") for file in files)


def _near(attribute: str, module: ModuleType) -> str:
    flows = [name for name, value in vars(module).items() if isinstance(value, Flow) and name != attribute]
    flows = [name for name in flows if hasattr(vars(module)[name], "fleet_limits")]
    flows = [name for name in flows if vars(module)[name].start_node is not None]
    close = difflib.get_close_matches(attribute, flows, 1, 0.5) or flows[:1]
    return f"; did you mean {module.__name__}:{close[0]}?" if close else ""


def _near_file(target: str) -> str:
    module, _, attribute = target.partition(":")
    close = difflib.get_close_matches(module, [path.stem for path in Path.cwd().glob("*.py")], 1, 0.5)
    if close:
        return f"; did you mean {close[0]}:{attribute}?"
    return f" in {Path.cwd().name or '/'} or on the path"


def said(error: BaseException) -> str:
    """What users' code raised and where, such as `KeyError: 'user_ids' (users.py, line 27)`."""
    text = printable(" ".join(str(error).split()), 300)
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shown if isinstance(error, SyntaxError) else shown + _place(error)


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code that the error went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        theirs = path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts
        if theirs and not any(path.is_relative_to(HOME / room) for room in OURS):
            return f" ({path.relative_to(Path.cwd())}, line {frame.lineno})"
    return ""
