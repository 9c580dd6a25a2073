"""Each example as its README has it: the same commands, real workers, and the services' own account."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shlex
import shutil
import signal
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pocketfleet
from tests.fleet import ROOT, Site, until

PORT = ":8090"


class Ran:
    """What a run of an example left: its own output, and the services' account of it.

    Attributes:
        files: the folder it ran in.
        said: what it printed.
        lines: the output file, in input order.
        account: what the services counted.
    """

    def __init__(self, site: Site, name: str, said: str, url: str) -> None:
        self.files = site.directory
        self.said = said
        written = (site.directory / "out.jsonl").read_text().splitlines()
        self.lines: list[dict[str, Any]] = sorted(map(json.loads, written), key=lambda line: line["index"])
        self.account = fetched(f"{url}/account")[name]
        self._kept = f"{url}/kept/{name}"

    def kept(self, step: str) -> Any:
        """The last body of each key that the step was given."""
        return fetched(f"{self._kept}/{step}")

    def step(self, name: str) -> Any:
        return self.account["steps"][name]

    def refusals(self) -> int:
        """How often the runs say that they were refused."""
        return sum(line["attempts"].get("refusals", 0) for line in self.lines)

    def check(self, items: list[dict[str, Any]]) -> None:
        """Every item has one line, which says that it completed."""
        assert [line["index"] for line in self.lines] == list(range(len(items)))
        assert [line["params"] for line in self.lines] == items
        assert {(line["status"], line["error"]) for line in self.lines} == {("completed", None)}
        assert f"{len(items)} completed" in self.said
        assert self.account["in_progress"] == 0


@contextlib.contextmanager
def ran(name: str) -> Iterator[Ran]:
    """The commands of an example's README, typed into a copy of the examples."""
    with tempfile.TemporaryDirectory(prefix="pf") as directory:
        left_out = shutil.ignore_patterns("__pycache__", ".pocketfleet", "out.jsonl")
        shutil.copytree(ROOT / "examples", Path(directory) / "e", ignore=left_out)
        site = Site(Path(directory) / "e" / name, "")
        try:
            serve, exports, run = commands(site.directory / "README.md")
            services = site.python(*[word.replace(PORT[1:], "0") for word in shlex.split(serve, True)[1:]])
            until(lambda: "http://" in services.output(), services.output())
            url = services.output().strip()
            port = url[url.rindex(":") :]
            for export in shlex.split(exports, True)[1:]:
                variable, _, value = export.partition("=")
                site.env[variable] = value.replace(PORT, port)
            fleet = site.typed(run)
            assert fleet.code() == 0, fleet.output()
            yield Ran(site, name, fleet.output(), url)
            services.tell(signal.SIGTERM)
            assert services.code() == 0
        finally:
            site.end()


def commands(readme: Path) -> tuple[str, str, str]:
    """How the services are started, what is exported, and how the example is run."""
    serve, exports, run, look = re.findall(r"^    (.*)$", readme.read_text(), re.MULTILINE)
    assert serve.startswith("python ../services ") and exports.startswith("export ")
    assert run.startswith("pocketfleet run ") and look.startswith("curl ")
    return serve, exports, run


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def number_of(text: str) -> int:
    return zlib.crc32(text.encode()) % 1000


def once(keys: list[str]) -> dict[str, int]:
    return dict.fromkeys(keys, 1)


def test_every_document_is_stored_and_only_long_ones_are_summarized() -> None:
    with ran("documents") as example:
        written = (example.files / "documents.jsonl").read_text()
        documents = [json.loads(line) for line in written.splitlines()]
        example.check(documents)
        texts = {document["doc_id"]: document["content"] for document in documents}
        long = [doc_id for doc_id, text in texts.items() if len(text.split()) >= 25]
        assert 0 < len(long) < len(documents)
        assert example.step("analyze")["answered"] == once(list(texts))
        assert example.step("summarize")["answered"] == once(long)
        assert example.step("store")["answered"] == once(list(texts))
        assert 2 <= example.account["most_in_progress"] <= 10
        stored = example.kept("store")
        for line in example.lines:
            doc_id = line["params"]["doc_id"]
            summary = stored[doc_id]["summary"]
            if doc_id in long:
                assert line["changed"]["summaries"] == {doc_id: summary}
                assert summary in texts[doc_id] and len(summary) < len(texts[doc_id])
            else:
                assert "summaries" not in line["changed"] and summary == texts[doc_id]


def test_onboarding_takes_three_at_a_time_and_creates_no_account_twice_when_mails_are_refused() -> None:
    with ran("onboarding") as example:
        users = json.loads((example.files / "users.json").read_text())["new_users"]
        example.check(users)
        emails = [user["email"] for user in users]
        for step in ("create", "email", "preferences"):
            assert example.step(step)["answered"] == once(emails), step
        assert example.account["most_in_progress"] == 3
        assert example.step("email")["most_at_once"] == 1
        assert example.step("email")["refused"] == example.refusals() > 0
        assert example.kept("preferences") == {user["email"]: user["preferences"] for user in users}
        assert "12 of 12 users onboarded" in example.said


def test_every_region_is_asked_within_its_own_limit() -> None:
    with ran("regions") as example:
        requests = json.loads((example.files / "requests.json").read_text())["requests"]
        items = [line["params"] for line in example.lines]
        assert {
            region: [each["request_id"] for each in items if each["region"] == region] for region in requests
        } == requests
        example.check(items)
        for region, ids in requests.items():
            # each region refuses what is beyond its limit
            assert (example.step(region)["refused"], example.step(region)["answered"]) == (0, once(ids))
        assert example.step("us")["most_at_once"] > 1 == example.step("asia")["most_at_once"]
        for line in example.lines:
            region, request_id = line["params"]["region"], line["params"]["request_id"]
            assert line["changed"] == {"answers": {request_id: number_of(region + request_id)}}


def test_calls_inside_nodes_keep_their_own_limit_across_users_and_processes() -> None:
    with ran("nested") as example:
        user_ids = json.loads((example.files / "users.json").read_text())["user_ids"]
        example.check([{"user_id": user_id} for user_id in user_ids])
        assert 2 <= example.account["most_in_progress"] <= 4
        assert (example.step("part")["most_at_once"], example.step("part")["refused"]) == (6, 0)
        assert (example.step("report")["refused"], example.step("report")["answered"]) == (0, once(user_ids))
        assert example.step("part")["answered"] == dict.fromkeys(user_ids, 5)
        totals = example.kept("report")
        for line in example.lines:
            user_id = line["params"]["user_id"]
            parts = line["changed"]["parts"][user_id]
            assert parts == {part: number_of(user_id + part) for part in parts} and len(parts) == 5
            assert totals[user_id] == {"total": sum(parts.values())}


FEELINGS = "+-+0-+-+0-+-+0-+0-+-+0+-"
"""What a person makes of each review."""


def test_reviews_go_through_the_openai_client_at_the_rate_its_server_takes() -> None:
    with ran("llm") as example:
        with (example.files / "reviews.csv").open(newline="") as file:
            reviews = list(csv.DictReader(file))
        example.check(reviews)
        assert example.step("chat")["answered"] == once([review["text"] for review in reviews])
        assert example.step("chat")["most_at_once"] == 4
        assert example.step("chat")["refused"] == example.refusals() > 0
        words = {"+": "positive", "-": "negative", "0": "neutral"}
        assert [line["action"] for line in example.lines] == [words[sign] for sign in FEELINGS]
        tokens = sum(line["changed"]["tokens"][line["params"]["review_id"]] for line in example.lines)
        assert f"'tokens': {tokens}" in example.said
        asked = example.kept("chat")[reviews[0]["text"]]
        assert (asked["model"], asked["messages"][0]["role"]) == ("gpt-4o-mini", "system")


def test_the_table_of_examples_has_every_folder_with_its_own_command() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)/\) \| .+ \| `(pocketfleet run .+)` \|$", table, re.MULTILINE)

    assert {name for name, _, _ in rows} == {path.parent.name for path in ROOT.glob("examples/*/flow.py")}
    for name, folder, command in rows:
        assert name == folder
        assert f"    {command}\n" in (ROOT / "examples" / folder / "README.md").read_text()


def test_every_name_that_stays_from_the_reference_is_there() -> None:
    page = (ROOT / "docs" / "from-the-reference.md").read_text()
    kept = re.search(r"^## What stays$(.*?)^## ", page, re.MULTILINE | re.DOTALL)
    assert kept is not None
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", kept[1], re.MULTILINE)

    assert len(rows) == 6
    for name, unchanged in rows:
        found = getattr(pocketfleet, name)
        attributes: list[str] = re.findall(r"`(\w+)(?:\(\))?`", unchanged)
        assert [each for each in attributes if not hasattr(found, each)] == []
