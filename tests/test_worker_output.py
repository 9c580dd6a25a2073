"""What a worker lets through of the lines that libraries write."""

from __future__ import annotations

import pytest

from tests import fleet

CHATTY = """
import logging, sys
from worker.output import prefix_items

if len(sys.argv) > 2:
    logging.getLogger("httpx").setLevel(sys.argv[2])
prefix_items(sys.argv[1])
for name in ("httpx", "users"):
    logging.getLogger(name).info("a line of %s", name)
logging.getLogger("httpx").warning("a warning")
"""


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["INFO"], ["INFO users a line of users", "WARNING httpx a warning"]),
        (["WARNING"], ["WARNING httpx a warning"]),
        (["DEBUG"], ["INFO httpx a line of httpx", "INFO users a line of users", "WARNING httpx a warning"]),
        (
            ["INFO", "INFO"],
            ["INFO httpx a line of httpx", "INFO users a line of users", "WARNING httpx a warning"],
        ),
    ],
)
def test_a_line_a_request_is_left_out_unless_the_user_wants_it(words: list[str], shown: list[str]) -> None:
    with fleet.site({"chatty.py": CHATTY}) as site:
        child = site.python("chatty.py", *words)
        assert child.code() == 0, child.output()
        assert child.output().splitlines() == shown
