"""Text from elsewhere (Redis, exceptions, operators, users' nodes) as a log line or a terminal may have it."""

from __future__ import annotations

import re

_OBEYED = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor, erasing
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # titles, clipboard, links, with their text
    r"|\x1b[ -/]*[0-~]"
)
_SHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of what follows."""


def printable(text: object, most: int = 500) -> str:
    r"""`text` in one line: what a terminal or a log would obey is shown instead, what is too long is cut.

    >>> printable("ok\x1b[2J\nCRITICAL forged"), printable("日本 ünï"), printable("a" * 9, 5)
    ('ok\\x1b[2J\\nCRITICAL forged', '日本 ünï', 'aaaa…')
    """
    whole = str(text)
    if whole.isprintable():
        shown = whole
    else:
        shown = "".join(ch if ch.isprintable() else _escaped(ch) for ch in whole)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def plain(text: str) -> str:
    r"""Lines that a user's code wrote, in full, without what a terminal would obey.

    Colours and other sequences go, a single control character is shown; of what a carriage return would
    write over, the last stays. Tabs, ends of lines and every letter stay as they are.

    >>> plain("\x1b[31mred\x1b[0m\tcell\a"), plain("10%\r 90%\r\n"), plain("\x1b]0;title\a日本\x1b[")
    ('red\tcell\\x07', ' 90%\n', '日本')
    """
    if not _SHOWN.search(text):
        return text
    return "\n".join(_plain_line(line) for line in text.split("\n"))


def _plain_line(line: str) -> str:
    last = line.rstrip("\r").rpartition("\r")[2]
    return _SHOWN.sub(lambda found: _escaped(found[0]), _OBEYED.sub("", last))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
