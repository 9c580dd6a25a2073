"""What a run changed in the shared store: found after it ran, sent as a plain tree, put back elsewhere.

A tree is a dict of up to three sections; an empty one is left out, and no change at all is `{}`:

    {"=": {key: value},      set: the key is new, or its old value is replaced
     "+": {key: [items]},    gained: the list in the base got these items at its end
     "{": {key: tree}}       merged: something changed inside the dict in the base

So with an empty base the tree is `{"=": store}`: nothing is copied or wrapped. Sections hold the keys
of users, never the other way round, so no key of theirs can be taken for a section. Deletions do not
travel; tuples count as lists; 1, 1.0 and True differ.
"""

from __future__ import annotations

import reprlib
from itertools import repeat
from typing import Any

from worker.codec import DEPTH, encode

SET, GAIN, MERGE = "=", "+", "{"
Tree = dict[str, dict[Any, Any]]
Path = tuple[Any, ...]

NAMED = 100
"""At most so many entries are named as left behind; the rest is counted."""


def difference(base: dict[Any, Any], now: dict[Any, Any]) -> tuple[Tree, list[str]]:
    """What `now` has that `base` has not, and the paths of the entries which cannot travel.

    The tree can be encoded, nests at most `codec.DEPTH` levels of the store and comes back as it is.
    It shares its values with `now`: encode it before the run goes on. An entry of a dict is left
    behind alone; a list is left behind whole. Paths read like `'user'['photo']`.
    """
    if not base and _plain_dict(now, 0):
        return ({SET: now} if now else {}), []
    left = _LeftBehind()
    return _compared(base, now, (), left), left.named()


def apply(base: dict[Any, Any], tree: Tree) -> dict[Any, Any]:
    """Put a tree's changes into `base`, in place, and return it.

    `apply(copy of base, difference(base, now)[0])` equals `now` unless `now` lost a key or an entry
    was left behind. Dicts and lists that stand in `base` stay the same objects; values that are
    new there are the tree's own.
    """
    for key, value in tree.get(SET, _NOTHING).items():
        _put(base, key, value)
    for key, items in tree.get(GAIN, _NOTHING).items():
        held = base.get(key)
        if isinstance(held, list):
            held.extend(items)
        else:
            base[key] = [*held, *items] if isinstance(held, tuple) else list(items)
    for key, inner in tree.get(MERGE, _NOTHING).items():
        held = base.get(key)
        if not isinstance(held, dict):
            held = base[key] = {}
        apply(held, inner)
    return base


def changed(tree: Tree) -> dict[Any, Any]:
    """The tree as people read it: values as they were set, the items a list gained, dicts nested.

    >>> changed({"=": {"name": "Ada"}, "+": {"log": ["met"]}, "{": {"stats": {"=": {"calls": 2}}}})
    {'name': 'Ada', 'log': ['met'], 'stats': {'calls': 2}}
    """
    plain = {**tree.get(SET, _NOTHING), **tree.get(GAIN, _NOTHING)}
    plain.update((key, changed(inner)) for key, inner in tree.get(MERGE, _NOTHING).items())
    return plain


def is_tree(tree: Any) -> bool:
    """Whether `apply` and `changed` can take it.

    >>> is_tree({"=": {"a": 1}, "{": {"b": {"+": {"c": [2]}}}}), is_tree({"+": {"c": 2}}), is_tree({"{": {"b": 1}})
    (True, False, False)
    """
    if type(tree) is not dict:
        return False
    own, gained, merged = (tree.get(section, _NOTHING) for section in (SET, GAIN, MERGE))
    if not type(own) is type(gained) is type(merged) is dict:
        return False
    return all(type(items) is list for items in gained.values()) and all(map(is_tree, merged.values()))


def equal(one: Any, other: Any) -> bool:
    """Equal and of the same types all the way down; tuples count as lists, order of keys does not.

    >>> equal({"a": (1, 2)}, {"a": [1, 2]}), equal(1, True), equal(1, 1.0)
    (True, False, False)
    """
    kind, other_kind = type(one), type(other)
    if kind in _LISTS:
        return other_kind in _LISTS and len(one) == len(other) and all(map(equal, one, other))
    if kind is not other_kind:
        return False
    if kind is not dict:
        return bool(one == other)
    if {(type(key), key) for key in one} != {(type(key), key) for key in other}:
        return False
    return all(map(equal, one.values(), map(other.__getitem__, one)))


def is_plain(value: Any) -> bool:
    """Whether a value comes back as it is sent (a tuple as a list), found without encoding it."""
    return _plain(value, 0)


def spelled(path: Path) -> str:
    """A path as the codec writes it.

    >>> spelled(("user", "tags", 2))
    "'user'['tags'][2]"
    """
    first, *inner = map(_shown, path)
    return first + "".join(f"[{key}]" for key in inner)


_NOTHING: dict[Any, Any] = {}
_LISTS = (list, tuple)
_SURE = frozenset((bool, bytes, type(None)))
_KEYS = frozenset((str, int, float, bool, bytes, type(None)))
_LOWEST, _ABOVE = -(2**63), 2**64

_keys = reprlib.Repr()
_keys.maxstring = _keys.maxother = _keys.maxlong = 80


def _shown(key: Any) -> str:
    return _keys.repr(key).encode("utf-8", "backslashreplace").decode()


def _put(base: dict[Any, Any], key: Any, value: Any) -> None:
    held = base.get(key)
    if isinstance(held, list) and type(value) in _LISTS:
        held[:] = value
    else:
        base[key] = value


def _compared(base: dict[Any, Any], now: dict[Any, Any], path: Path, left: _LeftBehind) -> Tree:
    """The tree of a dict that stands in the base. Keys in `now` may be anything."""
    fresh: dict[Any, Any] = {}
    gained: dict[Any, Any] = {}
    merged: dict[Any, Any] = {}
    for key, value in now.items():
        if type(key) not in _KEYS or key not in base:
            fresh[key] = value
            continue
        old = base[key]
        kind = type(value)
        if value is old:
            continue
        if kind is dict and type(old) is dict:
            if _unchanged(value, old):
                continue
            if len(path) + 1 >= DEPTH:
                left.add((*path, key))
            elif inner := _compared(old, value, (*path, key), left):
                merged[key] = inner
        elif kind in _LISTS and type(old) in _LISTS:
            items = _gained(old, value)
            if items is None:
                fresh[key] = value
            elif items:
                gained[key] = items
        elif not (kind is type(old) and kind in _KEYS and value == old):
            fresh[key] = value
    tree: Tree = {}
    if fresh and (sets := left.sorted_out(fresh, path)):
        tree[SET] = sets
    if gained and (gains := left.sorted_out(gained, path)):
        tree[GAIN] = gains
    if merged:
        tree[MERGE] = merged
    return tree


def _gained(old: Any, value: Any) -> Any:
    """The items after those of `old`, or None if `value` does not begin with all of `old`."""
    size = len(old)
    if len(value) < size:
        return None
    head = value if len(value) == size else value[:size]
    try:
        return value[size:] if _unchanged(head, old) or equal(head, old) else None
    except RecursionError:
        return None


def _unchanged(value: Any, old: Any) -> bool:
    """True only if nothing changed; False may be wrong (a tuple, another order of keys).

    The bytes tell 1 from True and take a tenth of the time of a walk; comparing the values as well
    tells a set or a date from the list or the text it is encoded as.
    """
    try:
        return encode(value) == encode(old) and bool(value == old)
    except Exception:  # the value may be anything, and so may what it raises
        return False


class _LeftBehind:
    """Sorts out what cannot travel, and names it."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._more = 0
        self._inside: set[int] = set()
        self._met: set[int] = set()
        self._repeats = 0

    def add(self, path: Path) -> None:
        if len(self._paths) < NAMED:
            self._paths.append(spelled(path))
        else:
            self._more += 1

    def named(self) -> list[str]:
        return [*self._paths, f"and {self._more} more"] if self._more else self._paths

    def sorted_out(self, entries: dict[Any, Any], path: Path) -> dict[Any, Any]:
        """`entries` themselves if all can travel, else a copy without those that cannot."""
        depth = len(path)
        if _plain_dict(entries, depth):
            return entries
        kept: dict[Any, Any] = {}
        for key, value in entries.items():
            if not _plain_key(key):
                self.add((*path, key))
            elif _plain(value, depth + 1):
                kept[key] = value
            elif type(value) is dict and depth + 1 < DEPTH and self._may_enter(value):
                self._inside.add(id(value))
                kept[key] = self.sorted_out(value, (*path, key))
                self._inside.discard(id(value))
            else:
                self.add((*path, key))
        return kept

    def _may_enter(self, value: dict[Any, Any]) -> bool:
        """Not into a cycle; and, as a graph can have any number of paths, not for ever."""
        if id(value) in self._inside:
            return False
        if id(value) in self._met:
            self._repeats += 1
        self._met.add(id(value))
        return self._repeats <= NAMED


def _plain_dict(entries: dict[Any, Any], depth: int) -> bool:
    """True if `codec.travels` would accept the dict, found without encoding it."""
    if depth >= DEPTH and entries:
        return False
    for key, value in entries.items():
        if not ((type(key) is str and key.isascii()) or _plain_key(key)):
            return False
        if not ((type(value) is str and value.isascii()) or _plain(value, depth + 1)):
            return False
    return True


def _plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind is str:
        return value.isascii() or _is_text(value)
    if kind is int:
        return bool(_LOWEST <= value < _ABOVE)
    if kind is float:
        return bool(value == value)
    if kind in _SURE:
        return True
    if kind is dict:
        return _plain_dict(value, depth)
    return kind in _LISTS and _plain_list(value, depth)


def _plain_list(items: Any, depth: int) -> bool:
    if depth >= DEPTH and items:
        return False
    if len(items) > 8:  # long lists of one kind (ids, an embedding) are looked at in one go
        kinds = set(map(type, items))
        if kinds == {int}:
            return bool(min(items) >= _LOWEST and max(items) < _ABOVE)
        if kinds == {float} and sum(items) - sum(items) == 0.0:  # neither NaN nor infinite
            return True
        if kinds == {str} and all(map(str.isascii, items)):
            return True
    return all(map(_plain, items, repeat(depth + 1)))


def _plain_key(key: Any) -> bool:
    kind = type(key)
    return kind in _KEYS and _plain(key, 0)


def _is_text(value: str) -> bool:
    """False for a lone surrogate. Encoding leaves its bytes with the text, so the next time is free."""
    try:
        encode(value)
    except UnicodeEncodeError:
        return False
    return True
