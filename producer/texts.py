"""Sizes and times as people read them."""

from __future__ import annotations


def size_text(size: float) -> str:
    """
    >>> size_text(900), size_text(2_500_000)
    ('900 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def duration(seconds: float) -> str:
    """
    >>> duration(2.34), duration(42), duration(130), duration(600), duration(9000), duration(604800)
    ('2.3 s', '42 s', '2 min 10 s', '10 min', '2.5 h', '7 days')
    """
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 600:
        return "{} min {:02} s".format(*divmod(int(seconds), 60))
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.3g} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.3g} days"
