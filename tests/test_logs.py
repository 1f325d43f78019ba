"""Where records go, what they carry, and that importing configures nothing."""

from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvxfer import logs
from kvxfer.errors import OptionError
from kvxfer.options import Options
from kvxfer.testing import loopback
from tests.endpoints import QUICK

LOG = logging.getLogger("kvxfer.tests")


def say_all() -> None:
    LOG.debug("a detail")
    LOG.info("of note")
    LOG.warning("a warning")
    LOG.error("an error")


def said(options: Options, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    with logs.configure(options, verbose=verbose, stream=stream):
        say_all()
    return stream.getvalue()


def test_warnings_go_to_standard_error_and_debug_brings_the_rest() -> None:
    text = said(Options())
    assert "a warning" in text and "an error" in text
    assert "of note" not in text
    for everything in (said(Options(debug=True)), said(Options(), verbose=True)):
        assert "a detail" in everything and "of note" in everything


def test_the_files_of_the_seed(tmp_path: Path) -> None:
    options = Options(
        debug=True,
        debug_file=str(tmp_path / "%h.%p.debug"),
        error_file=str(tmp_path / "%p.errors"),
    )
    name = f"{socket.gethostname()}.{os.getpid()}.debug"
    (tmp_path / name).write_text("of an earlier run\n")
    text = said(options)
    assert "a warning" in text and "a detail" not in text
    debug = (tmp_path / name).read_text().splitlines()
    assert [line.partition("kvxfer.tests: ")[2] for line in debug] == [
        *("a detail", "of note", "a warning", "an error")
    ]
    errors = (tmp_path / f"{os.getpid()}.errors").read_text().splitlines()
    assert [line.split()[2] for line in errors] == ["WARNING", "ERROR"]


def test_a_debug_file_without_debug_has_what_is_of_note(tmp_path: Path) -> None:
    said(Options(debug_file=str(tmp_path / "log")))
    text = (tmp_path / "log").read_text()
    assert "of note" in text and "a detail" not in text


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    options = Options(
        debug_file=str(tmp_path / "log"), error_file=str(tmp_path / "none" / "errors")
    )
    before = list(logging.getLogger("kvxfer").handlers)
    with pytest.raises(OptionError, match=r"error_file.*none.*No such file"):
        logs.configure(options)
    assert logging.getLogger("kvxfer").handlers == before


def test_the_second_configuration_takes_the_place_of_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure(Options(), stream=first)
    with logs.configure(Options(), stream=second):
        say_all()
    assert "a warning" not in first.getvalue()
    assert second.getvalue().count("a warning") == 1
    assert not logging.getLogger("kvxfer").handlers
    assert logging.getLogger("kvxfer").propagate


def test_records_carry_facts() -> None:
    stream = io.StringIO()
    log = logs.bind(LOG, peer="10.0.0.2:7777", qpn=0x1A, gid=None)
    with logs.configure(Options(), stream=stream):
        log.warning("broken", extra={"request": "r1"})
    line = stream.getvalue()
    assert line.endswith(
        "kvxfer.tests: broken [peer=10.0.0.2:7777 qpn=0x1a request=r1]\n"
    )


async def test_connections_say_which_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvxfer"):
        async with loopback(**QUICK) as pair:
            qpn = pair.peer.link.qp.qp_num
            await pair.client.write_cache(pair.peer, [1], [2])
    (record,) = [r for r in caplog.records if r.message.startswith("connected to")]
    facts = record.__dict__
    assert (facts["peer"], facts["qpn"]) == (pair.peer.address, qpn)
    assert facts["gid"] == pair.peer.link.gid.text


def test_importing_configures_nothing() -> None:
    program = (
        "import logging, kvxfer, kvxfer.server, kvxfer.logs\n"
        "assert not logging.getLogger().handlers\n"
        "names = [n for n in logging.root.manager.loggerDict if 'kvxfer' in n]\n"
        "assert names\n"
        "assert not [n for n in names if logging.getLogger(n).handlers]\n"
        "assert logging.getLogger('kvxfer').level == logging.NOTSET\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
