"""Text from elsewhere (Redis, exceptions, operators) as it may stand in a log line or on a terminal."""

from __future__ import annotations


def printable(text: object, most: int = 500) -> str:
    r"""`text` in one line: what a terminal or a log would obey is shown instead, what is too long is cut.

    >>> printable("ok\x1b[2J\nCRITICAL forged"), printable("日本 ünï"), printable("a" * 9, 5)
    ('ok\\x1b[2J\\nCRITICAL forged', '日本 ünï', 'aaaa…')
    """
    whole = str(text)
    if whole.isprintable():
        shown = whole
    else:
        shown = "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in whole)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
