"""Folds what many runs changed into the caller's store, the same whatever order they end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from typing import Any

from worker.difference import GAIN, MERGE, SET, Path, Tree, apply, equal

Rule = Callable[[Any, Any, Any], Any]
"""`merge(key, mine, theirs)` returns the value of an entry that runs changed differently.

Called once per further run, in input order: `mine` starts as the first run's value and is then what
the last call returned, `theirs` is the next run's value. What the base held is not among them. `key`
is the entry's key, or the tuple of keys that lead to an entry further inside.
"""

_Change = tuple[int, int, str, Any]
"""Index of the run, place of the key in its tree, section, and what stands there."""


@dataclass(frozen=True)
class Conflict:
    """Two runs changed one entry and cannot both stand. Its text is one sentence for people.

    Attributes:
        path: the keys that lead to the entry.
        items: indexes of two runs that disagree, in input order; there may be more.
        reason: what they did, in words.
        error: what the rule raised, where there is one.
    """

    path: Path
    items: tuple[int, int]
    reason: str
    error: Exception | None = None

    def __str__(self) -> str:
        first, second = self.items
        *outer, last = (f"{key!r:.80}" for key in self.path)
        store = "shared" + "".join(f"[{key}]" for key in outer)
        if self.error is not None:
            return (
                f"merge= raised {type(self.error).__name__}: {self.error!s:.200} for {store}[{last}], changed by "
                f"items {first} to {second}, so the last item in input order wins there: mend merge="
            )
        return (
            f"items {first} and {second} {self.reason} {store}[{last}], and the last item in input order wins: "
            f"write {store}.setdefault({last}, {{}})[item] = ..., a key per item, or pass merge= to say how "
            "they join"
        )


class Merger:
    """Folds runs' differences into `store`, in place.

    Args:
        store: the caller's shared store. Dicts and lists in it stay the same objects. An entry of it
            that is not in `base` is local: runs cannot change it.
        base: what every run started from.
        rule: decides conflicts (`merge=`). With it no conflict is told, unless the rule raises.

    Attributes:
        conflicts: how many entries are in conflict so far.
        first: the first conflict that was seen, or None.
        kept_local: local keys that runs wrote to, in vain; to be told.

    Time per run grows with what it changed and not with the number of runs. Every difference is
    kept until `finish`, unopened where only one run changed an entry.
    """

    def __init__(self, store: dict[Any, Any], base: dict[Any, Any], rule: Rule | None = None) -> None:
        self.conflicts = 0
        self.first: Conflict | None = None
        self.kept_local: set[Any] = set()
        self._store = store
        self._base = base
        self._rule = rule
        self._local = store.keys() - base.keys()
        self._seen: set[int] = set()
        self._entries: dict[Any, _Entry | _Change] = {}

    def add(self, index: int, tree: Tree | None) -> Conflict | None:
        """Take the difference of item `index`; only the first one given for an index counts.

        Returns the first conflict of the whole batch at the call that makes it, else None. Items
        may come in any order: it never matters to the merged store.
        """
        if index in self._seen:
            return None
        self._seen.add(index)
        nothing_yet = self.first is None
        for place, (key, section, what) in enumerate(_changes(tree or {}, self._base)):
            if key in self._local:
                self.kept_local.add(key)
            else:
                self._put(self._entries, self._base, key, (index, place, section, what), ())
        return self.first if nothing_yet else None

    def finish(self) -> None:
        """Write everything that was added into the store, new keys in input order. Call it once."""
        entries, self._entries = self._entries, {}
        self._write_all(self._store, entries, ())

    def _put(self, entries: _Entries, base: dict[Any, Any], key: Any, change: _Change, path: Path) -> None:
        held = entries.get(key)
        if held is None:
            entries[key] = change
            return
        path, old = (*path, key), base.get(key, _ABSENT)
        if type(held) is tuple:
            first, held = held, _Entry()
            entries[key] = held
            self._join(held, old, first, path)
        self._join(held, old, change, path)  # type: ignore[arg-type]

    def _join(self, entry: _Entry, old: Any, change: _Change, path: Path) -> None:
        index, _, section, what = change
        if not entry.clash and (clash := entry.clash_with(section, what, old)):
            entry.clash = True
            if self._rule is None:
                other, reason = clash
                self._tell(Conflict(path, (min(other, index), max(other, index)), reason))
        entry.take(change)
        if self._rule is not None:
            entry.all.append(change)
        if section == MERGE:
            inside = old if isinstance(old, dict) else {}
            for place, (key, inner, value) in enumerate(_changes(what, inside)):
                self._put(entry.inside, inside, key, (index, place, inner, value), path)

    def _tell(self, conflict: Conflict) -> None:
        self.conflicts += 1
        self.first = self.first or conflict

    def _write_all(self, parent: dict[Any, Any], entries: _Entries, path: Path) -> None:
        for key, held in sorted(entries.items(), key=_first_seen):
            if isinstance(held, tuple):
                apply(parent, {held[2]: {key: held[3]}})
            elif not (held.clash and self._ruled(parent, key, held, (*path, key))):
                self._write(parent, key, held, (*path, key))

    def _write(self, parent: dict[Any, Any], key: Any, entry: _Entry, path: Path) -> None:
        """The kind of change the last item made wins; all changes of that kind join."""
        if entry.last[1] == SET:
            apply(parent, {SET: {key: entry.value[1]}})
        elif entry.last[1] == GAIN:
            gained = sorted(entry.gained, key=_index)
            apply(parent, {GAIN: {key: [item for _, items in gained for item in items]}})
        else:
            apply(parent, {MERGE: {key: {}}})
            self._write_all(parent[key], entry.inside, path)

    def _ruled(self, parent: dict[Any, Any], key: Any, entry: _Entry, path: Path) -> bool:
        """Let the user's rule decide, if there is one. A rule that raises must not cost the batch."""
        rule, name = self._rule, path[0] if len(path) == 1 else path
        if rule is None:
            return False
        changes = sorted(entry.all, key=_index)
        try:
            mine, *others = (_left_by(change, parent, key) for change in changes)
            merged = reduce(lambda so_far, theirs: rule(name, so_far, theirs), others, deepcopy(mine))
        except Exception as error:
            self._tell(Conflict(path, (changes[0][0], changes[-1][0]), "met a rule that raised on", error))
            return False
        apply(parent, {SET: {key: merged}})
        return True


_ABSENT: Any = object()


class _Entry:
    """What two or more runs did to one entry of a dict."""

    __slots__ = ("all", "clash", "equals_count", "first", "gained", "inside", "last", "sections", "value")

    def __init__(self) -> None:
        self.sections: dict[str, int] = {}
        self.first: tuple[int, int] | None = None
        self.last: tuple[int, str] = (-1, "")
        self.value: tuple[int, Any] = (-1, None)
        self.gained: list[tuple[int, Any]] = []
        self.inside: _Entries = {}
        self.all: list[_Change] = []
        self.clash = False
        self.equals_count: bool | None = None

    def clash_with(self, section: str, what: Any, old: Any) -> tuple[int, str] | None:
        """The item that this change cannot stand beside, and why; None if all can stand."""
        for other, index in self.sections.items():
            if other != section:
                return index, "made different kinds of changes to"
        if section != SET or not self.sections:
            return None
        index, value = self.value
        if not equal(value, what):
            return index, "both changed"
        if self.equals_count is None:
            self.equals_count = _counted(old, value)
        return (index, "both counted on a number in") if self.equals_count else None

    def take(self, change: _Change) -> None:
        index, place, section, what = change
        self.sections.setdefault(section, index)
        if self.first is None or (index, place) < self.first:
            self.first = (index, place)
        if index > self.last[0]:
            self.last = (index, section)
        if section == SET and index > self.value[0]:
            self.value = (index, what)
        elif section == GAIN:
            self.gained.append((index, what))


_Entries = dict[Any, _Entry | _Change]


def _changes(tree: Tree, base: dict[Any, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Key, section and content of each change; a new dict is merged and a new list gained.

    So runs that each do `shared.setdefault("results", [])` or `({})` join instead of clashing.
    """
    for key, value in tree.get(SET, _NOTHING).items():
        kind = type(value)
        if key in base or kind not in (dict, list, tuple):
            yield key, SET, value
        elif kind is dict:
            yield key, MERGE, {SET: value}
        else:
            yield key, GAIN, value
    for section in (GAIN, MERGE):
        for key, what in tree.get(section, _NOTHING).items():
            yield key, section, what


_NOTHING: dict[Any, Any] = {}


def _counted(old: Any, new: Any) -> bool:
    """True if a number that stood in the base is another number now: two equal ones are a lost update.

    >>> _counted(5, 6), _counted([{"n": 5}], [{"n": 6}]), _counted(None, 6), _counted([2, 1], [1, 2])
    (True, True, False, False)
    """
    if type(old) in (int, float):
        return type(new) in (int, float) and old != new
    if isinstance(old, dict) and isinstance(new, dict):
        return any(_counted(old[key], value) for key, value in new.items() if key in old)
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        sorted_only = sorted(map(repr, old)) == sorted(map(repr, new))
        return not sorted_only and any(map(_counted, old, new))
    return False


def _left_by(change: _Change, parent: dict[Any, Any], key: Any) -> Any:
    """The value of `parent[key]` as that run left it; `parent` still is as the base had it."""
    _, _, section, what = change
    if section == SET:
        return what
    own = {key: deepcopy(parent[key])} if key in parent else {}
    return apply(own, {section: {key: what}})[key]


def _index(change: tuple[Any, ...]) -> int:
    return change[0]  # type: ignore[no-any-return]


def _first_seen(entry: tuple[Any, _Entry | _Change]) -> tuple[int, int]:
    held = entry[1]
    return held[:2] if isinstance(held, tuple) else held.first or (0, 0)
