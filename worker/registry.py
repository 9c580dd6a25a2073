"""From a target such as `users:flow` to the flow it names. The only place that imports users' code."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pocketflow import BaseNode, Flow

from limiter.errors import LimitsError
from limiter.limits import Limits
from worker.contract import FOUND_NAME, FleetFlow
from worker.errors import TargetError

OURS = ("pocketfleet", "worker", "limiter", "producer")
HOME = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ServedFlow:
    """A flow with the names under which the fleet knows it."""

    target: str
    name: str
    limits: Limits
    flow: FleetFlow


def serve(targets: list[str], lease_s: float) -> list[ServedFlow]:
    """The flows that `targets` name.

    Raises:
        TargetError: one of them leads to no flow that could run.
        LimitsError: their limits or names cannot hold, or two flows give one limit different values.
    """
    served = [named(find_flow(target), target, lease_s) for target in targets]
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
    return checked_flow(_made(target, found), target)


def checked_flow(found: Any, target: str) -> FleetFlow:
    """`found` if it is a flow that a fleet can run."""
    if not isinstance(found, Flow) or not hasattr(found, "fleet_limits"):
        what = (
            f"is a {type(found).__name__}" if isinstance(found, BaseNode) else f"is {found!r:.60}, not a flow"
        )
        raise TargetError(target, f"{what}; name a ThrottledAsyncParallelBatchFlow")
    if found.start_node is None:
        raise TargetError(target, f"{type(found).__name__} has no start node; make it with start=")
    return cast(FleetFlow, found)


def _made(target: str, found: Any) -> Any:
    """The flow itself, or what a zero-argument factory (or a flow class) returns."""
    if isinstance(found, BaseNode) or not callable(found):
        return found
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
        raise TargetError(target, f"failed when it was called: {_said(error)}") from error


def _import(target: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    check_shadows(target, name)
    try:
        return importlib.import_module(name)
    except LimitsError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(target, f"there is no module {error.name}{_near_file(name)}") from None
        raise TargetError(target, f"module {name} cannot be imported: {_said(error)}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(target, f"module {name} cannot be imported: {_said(error)}") from error


def check_shadows(target: str, module: str = "") -> None:
    """Refuse a module of the user's own that is called like one of our rooms, whichever hides the other."""
    for room in OURS:
        loaded = sys.modules.get(room)
        origin = getattr(loaded, "__file__", None)
        if origin and Path(origin).resolve().parent.parent != HOME:
            raise TargetError(target, f"{origin} hides PocketFleet's own '{room}'; rename it")
        for own in (Path.cwd() / f"{room}.py", Path.cwd() / room / "__init__.py"):
            if own.exists() and own.resolve().parent.parent != HOME and own.resolve().parent != HOME:
                shown = own.relative_to(Path.cwd())
                raise TargetError(target, f"{shown} has the name of PocketFleet's own '{room}'; rename it")
    if module.split(".")[0] in OURS:
        raise TargetError(target, f"'{module.split('.')[0]}' is PocketFleet's own; name a module of yours")


def _near(attribute: str, module: ModuleType) -> str:
    flows = [name for name, value in vars(module).items() if isinstance(value, Flow)]
    close = difflib.get_close_matches(attribute, flows, 1, 0.4) or flows[:1]
    close = close or difflib.get_close_matches(attribute, [n for n in vars(module) if n[0] != "_"], 1)
    return f"; did you mean {module.__name__}:{close[0]}?" if close else ""


def _near_file(module: str) -> str:
    files = [path.stem for path in Path.cwd().glob("*.py")]
    close = difflib.get_close_matches(module, files, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f" in {Path.cwd().name or '/'} or on the path"


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}" if text else type(error).__name__
