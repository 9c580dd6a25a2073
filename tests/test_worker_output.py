"""What a worker lets through of the lines that libraries write."""

from __future__ import annotations

import contextvars
import io

import pytest

from tests import fleet
from worker import output

CHATTY = """
import logging, sys
from worker.output import prefix_items

if len(sys.argv) > 2:
    logging.getLogger("httpx").setLevel(sys.argv[2])
prefix_items(sys.argv[1])
for name in ("httpx", "httpx2", "users"):
    logging.getLogger(name).info("a line of %s", name)
logging.getLogger("httpx").warning("a warning")
"""


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["INFO"], ["INFO users a line of users", "WARNING httpx a warning"]),
        (["WARNING"], ["WARNING httpx a warning"]),
        (
            ["DEBUG"],
            [
                "INFO httpx a line of httpx",
                "INFO httpx2 a line of httpx2",
                "INFO users a line of users",
                "WARNING httpx a warning",
            ],
        ),
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


DOTS = """
import os
from pocketflow import AsyncNode
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Step(AsyncNode):
    async def exec_async(self, _):
        print("a line\\nand a dot", end="", flush=self.params["flushes"])
        if self.params["last"]:
            os.write(1, b"the last one\\n")

class Dots(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 1

flow = Dots(start=Step())
"""


def test_what_a_run_has_not_ended_with_a_newline_goes_out_when_it_ends() -> None:
    with fleet.site({"dots.py": DOTS}) as site:
        site.enqueue("dots:flow", [{"flushes": n == 1, "last": n == 2} for n in range(3)])
        worker = site.pocketfleet("worker", "dots:flow", "--burst")
        assert worker.code() == 0, worker.output()
        shown = [line for line in worker.output().splitlines() if line.startswith("[b:") or "last" in line]
        each = [[f"[b:{n}] a line", f"[b:{n}] and a dot"] for n in range(3)]
        assert shown == each[0] + each[1] + each[2][:1] + ["the last one"] + each[2][1:]


def test_a_run_that_is_over_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    stream = output.ItemPrefix(out)
    monkeypatch.setattr(output, "_prefixed", [stream])

    def run(tag: str) -> None:
        output.item.set(tag)
        stream.write(".")
        stream.flush()
        stream.write(".")
        output.end_lines()
        output.end_lines()

    for n in range(3):
        contextvars.copy_context().run(run, f"b:{n}")

    assert out.getvalue() == "[b:0] ..\n[b:1] ..\n[b:2] ..\n"
    assert stream._begun == {}


def test_a_run_ends_though_another_thread_has_just_put_out_what_it_had_begun() -> None:
    stream = io.StringIO()
    prefix = output.ItemPrefix(stream)
    contextvars.copy_context().run(lambda: (output.item.set("b:2"), prefix.write("50%")))
    assert prefix.has_begun("b:2")
    prefix.flush()
    prefix.end("b:2")
    assert stream.getvalue() == "[b:2] 50%" and not prefix.has_begun("b:2")


LETTER = """
from pocketflow import Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Step(Node):
    def exec(self, _):
        print("done \\u2713")

class Letters(ThrottledAsyncParallelBatchFlow):
    pass

flow = Letters(start=Step())
"""


ELSEWHERE = """
import os, sys
os.close(1)
if sys.argv[1] != "nowhere":
    os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)  # takes the lowest number, 1
    os.set_inheritable(1, True)
os.execv(sys.executable, [sys.executable, "-m", "pocketfleet", "worker", "letters:flow", "--burst"])
"""


@pytest.mark.parametrize("out", ["/dev/full", "nowhere", "out.txt"])
def test_no_run_and_no_worker_fails_for_output_that_cannot_be_written(out: str) -> None:
    with fleet.site({"letters.py": LETTER, "elsewhere.py": ELSEWHERE}) as site:
        site.enqueue("letters:flow", [{"n": 0}, {"n": 1}])
        worker = site.python("elsewhere.py", out, PYTHONIOENCODING="ascii")
        assert [each.outcome.status for each in site.ended("letters:flow", 2)] == ["completed"] * 2
        worker.code()
        if out == "out.txt":
            assert r"[b:1] done \u2713" in (site.directory / out).read_text().splitlines()


FORKS = """
import os, signal, sys, threading, warnings
from worker.forked import let_go_in_forks
from worker.output import item, prefix_items

prefix_items("INFO")
let_go_in_forks()
item.set("b:1")
print("begun", end="")
begun, over = threading.Event(), threading.Event()

def in_the_middle():
    with sys.stdout.place.turn:
        begun.set()
        over.wait()

warnings.simplefilter("ignore")  # Python 3.12 warns of the fork: a line that would wait for the thread
threading.Thread(target=in_the_middle).start()
begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    print("from the child")
    os._exit(0)
_, how = os.waitpid(child, 0)
over.set()
print(", it ended with", how)
"""


def test_a_forked_process_prints_though_another_thread_was_just_printing() -> None:
    with fleet.site({"forks.py": FORKS}) as site:
        child = site.python("forks.py")
        assert child.code() == 0, child.output()
        assert child.output().splitlines() == ["[b:1] from the child", "[b:1] begun, it ended with 0"]


def test_what_runs_flush_before_its_line_ends_stays_apart() -> None:
    out = io.StringIO()
    place = output.Place()
    stream, beside = output.ItemPrefix(out, place=place), output.ItemPrefix(out, place=place)

    def say(tag: str, text: str, where: output.ItemPrefix = stream) -> None:
        def run() -> None:
            output.item.set(tag)
            where.write(text)
            where.flush()

        contextvars.copy_context().run(run)

    say("b:1", ".")
    say("b:1", ".")
    say("b:2", ".")
    say("b:1", "done\n")
    say("b:2", "!")
    stream.write("of nobody\n")
    say("b:2", "50%")
    say("b:1", "a log line\n", beside)
    say("b:2", "100%\n")
    say("b:2", "of one")
    say("b:2", " run\n", beside)
    assert out.getvalue().splitlines() == [
        *("[b:1] ..", "[b:2] .", "[b:1] done", "[b:2] !", "of nobody"),
        *("[b:2] 50%", "[b:1] a log line", "[b:2] 100%", "[b:2] of one run"),
    ]


OWN_LOGS = """
import logging, sys
logging.basicConfig(format="mine: %(message)s", level=logging.INFO)
from pocketflow import Node
from pocketfleet import ThrottledAsyncParallelBatchFlow

class Speak(Node):
    def exec(self, _):
        logging.info("hello")
        print("and a print")
        sys.stdout.close()

class Flow(ThrottledAsyncParallelBatchFlow):
    max_concurrent_flows = 1

flow = Flow(start=Speak())
"""


def test_lines_of_a_log_that_was_set_up_at_import_say_their_item_too() -> None:
    with fleet.site({"logs.py": OWN_LOGS}) as site:
        site.enqueue("logs:flow", [{}, {}])
        worker = site.pocketfleet("worker", "logs:flow", "--burst")
        assert worker.code() == 0, worker.output()
        shown = [line for line in worker.output().splitlines() if "hello" in line or "print" in line]
        assert shown == [f"[b:{n}] {text}" for n in range(2) for text in ("mine: hello", "and a print")]


WITHOUT = """
import os, sys
for number in 1, 2:
    if sys.argv[1] == "closed":
        os.close(number)
    else:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
os.execv(sys.executable, [sys.executable, "-m", "pocketfleet", "worker", "logs:flow", "--burst"])
"""


@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_worker_whose_output_nobody_takes_does_its_work(how: str) -> None:
    with fleet.site({"logs.py": OWN_LOGS, "without.py": WITHOUT}) as site:
        site.enqueue("logs:flow", [{}, {}])
        worker = site.python("without.py", how)
        ended = site.ended("logs:flow", 2)
        assert [each.outcome.status for each in ended] == ["completed"] * 2
        assert worker.code() == 0
