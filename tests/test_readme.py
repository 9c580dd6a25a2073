"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from limiter.settings import settings_table
from producer.settings import ProducerSettings

README = Path(__file__).resolve().parent.parent / "README.md"


def table() -> str:
    rows = ["| name | what it is | default |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {what} | {default} |" for name, what, default in settings_table(ProducerSettings)]
    return "\n".join(rows)


def test_the_settings_table_is_that_of_the_code() -> None:
    text = README.read_text()
    found = re.search(r"<!-- settings -->\n(.*?)\n?<!-- /settings -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == table()
