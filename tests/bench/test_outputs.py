"""What the command draws and writes, and the bar while it runs."""

from __future__ import annotations

import base64
import codecs
import importlib.util
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.test_bench_cli import LONG, TINY, bench
from tests.commands import ROOT

pytestmark = pytest.mark.usefixtures("commands")

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
RUN = [*TINY, "--sizes", "1K,4K", "--against", "memcpy"]
SHOWN = {"kvxfer", "memcpy", "1K", "4K"}

# -- drawings and the page ------------------------------------------------------------


def check_png(data: bytes) -> None:
    """Fail unless it is a whole PNG that shows something."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 300 and height > 200
    assert data[-8:-4] == b"IEND"


class Page(HTMLParser):
    """What is on a page: its cells and captions, what it fetches, its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "caption"):
            self.cells.append(data)


@needs_matplotlib
async def test_a_png_and_a_page(tmp_path: Path) -> None:
    drawn, page = tmp_path / "out.png", tmp_path / "out.html"
    code, _, err = await bench(*RUN, "--plot", str(drawn), "--html", str(page))
    assert code == 0, err
    check_png(drawn.read_bytes())
    text = page.read_text()
    found = Page(text)
    assert {cell.partition(":")[0] for cell in found.cells} >= SHOWN
    assert any("soft0 (shm), memory copies" in cell for cell in found.cells)
    # All of it is in the one file.
    (image,) = found.links
    kind, _, data = image.partition(",")
    assert kind == "data:image/png;base64"
    check_png(base64.b64decode(data))
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert "@import" not in text and "url(" not in text


@needs_matplotlib
async def test_an_svg(tmp_path: Path) -> None:
    drawn = tmp_path / "out.svg"
    code, _, err = await bench(*RUN, "--plot", str(drawn))
    assert code == 0, err
    text = drawn.read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    # Words are drawn as outlines; each says in a comment what it is.
    words = set(re.findall(r"<!-- (.*?) -->", text))
    assert words >= SHOWN
    assert any(word.endswith("soft0 (shm): memory copies, not a NIC") for word in words)
    links = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.rpartition("}")[2] in ("href", "src")
    ]
    assert links and all(link.startswith("#") for link in links)


@needs_matplotlib
async def test_a_page_of_the_null_device_has_no_bandwidth(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    code, _, err = await bench(
        *(*TINY, "--preset", "null", "--rounds", "1", "--html", str(page))
    )
    assert code == 0, err
    text = page.read_text()
    cells = Page(text).cells
    assert {"kvxfer", "verbs", "1K"} <= {cell.partition(":")[0] for cell in cells}
    assert "ns/block" in text and "p50 of a batch: kvxfer" in text
    assert "GB/s" not in text


# -- the bar --------------------------------------------------------------------------


class Terminal:
    """As much of one as a bar moves about on: lines, a cursor that may be hidden."""

    _PART = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0
        self.hidden = False
        self._rest = ""

    def feed(self, text: str) -> Iterator[str]:
        """Show what a program has written; give what is to be read after each part.

        A sequence may come in two pieces.
        """
        text = self._rest + text
        end = 0
        for part in self._PART.finditer(text):
            assert part.start() == end, f"an unknown sequence: {text[end:]!r}"
            end = part.end()
            self._take(*part.groups())
            yield self.text
        self._rest = text[end:]

    def _take(
        self, numbers: str | None, letter: str, move: str | None, written: str
    ) -> None:
        if move == "\r":
            self.column = 0
        elif move == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif written:
            line = self.lines[self.row].ljust(self.column)
            after = line[self.column + len(written) :]
            self.lines[self.row] = line[: self.column] + written + after
            self.column += len(written)
        elif letter == "A":
            self.row -= int(numbers or 1)
        elif letter == "K":
            assert numbers == "2", "only whole lines are erased"
            self.lines[self.row] = ""
        elif letter in "hl":
            assert numbers == "?25"
            self.hidden = letter == "l"
        else:
            assert letter == "m"  # colours

    @property
    def text(self) -> str:
        """What is to be read on it."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


class OnTerminal:
    """The bench whose stderr is a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.terminal = Terminal()
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvxfer", "bench", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)

    def screens(self) -> Iterator[str]:
        """Give what is on the terminal after every change of it, until the end."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline:
            if not select.select([self._fd], [], [], 1)[0]:
                continue
            try:
                data = os.read(self._fd, 4096)
            except OSError:  # nobody has it open any more
                return
            yield from self.terminal.feed(decode(data))
        raise AssertionError(f"not done after {LONG:g} s")

    def end(self) -> tuple[int, str]:
        """Return exit code and stdout."""
        out, _ = self.process.communicate(timeout=LONG)
        return self.process.returncode, out.decode()

    def close(self) -> None:
        """End what runs."""
        self.process.kill()
        self.process.communicate()
        os.close(self._fd)


def check_left(run: OnTerminal) -> None:
    """Fail if something is left on the terminal."""
    assert run.terminal.text == ""
    assert (run.terminal.row, run.terminal.column) == (0, 0)
    assert not run.terminal.hidden


def test_a_bar_counts_windows_and_leaves_nothing_behind() -> None:
    # Windows that are longer than it takes to draw the bar again.
    run = OnTerminal(*RUN, "--window", "0.3")
    try:
        screens = list(run.screens())
        code, out = run.end()
    finally:
        run.close()
    assert code == 0
    counts = [
        int(found[1])
        for text in screens
        if (found := re.search(r" (\d)/4 windows", text)) is not None
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0 and counts[-1] == 4 and len(set(counts)) > 3
    seen = "\n".join(screens)
    for words in ("round 1, kvxfer", "round 1, memcpy", ": 32 x 4K, ", " GB/s"):
        assert words in seen
    check_left(run)
    assert "GB/s" in out and "windows" not in out.replace("windows were disturbed", "")


def test_a_bar_that_is_interrupted_leaves_nothing_behind() -> None:
    run = OnTerminal("--pool", "1M", "--batch", "32", "--sizes", "1K", "--window", "30")
    try:
        interrupted = False
        for text in run.screens():
            if "0/1 windows" in text and not interrupted:
                run.process.send_signal(signal.SIGINT)
                interrupted = True
        assert run.end() == (130, "")
    finally:
        run.close()
    check_left(run)


async def test_without_a_terminal_there_is_no_bar() -> None:
    code, out, err = await bench(*RUN)
    assert (code, err) == (0, "")
    assert "\x1b" not in out and "/4 windows" not in out
