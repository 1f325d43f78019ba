"""The leak check sees what it says it sees."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

from tests.leaks import leaked_since, pending_tasks, take_census


def test_nothing_held_is_no_leak() -> None:
    assert leaked_since(take_census()) == []


def test_an_open_descriptor_is_named() -> None:
    before = take_census()
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        assert leaked_since(before, patience=0) == [f"fd {fd} -> {os.devnull}"]
    finally:
        os.close(fd)


def test_a_descriptor_closed_and_reused_for_something_else_is_seen() -> None:
    first = os.open(os.devnull, os.O_RDONLY)
    before = take_census()
    os.close(first)
    second = os.open("/dev/zero", os.O_RDONLY)
    try:
        assert leaked_since(before, patience=0) == [f"fd {second} -> /dev/zero"]
    finally:
        os.close(second)


def test_a_thread_is_named() -> None:
    before = take_census()
    finish = threading.Event()
    thread = threading.Thread(target=finish.wait, name="loiterer")
    thread.start()
    try:
        (leak,) = leaked_since(before, patience=0)
        assert leak.startswith("thread loiterer ")
    finally:
        finish.set()
        thread.join()


def test_a_child_process_is_named_and_so_is_its_zombie() -> None:
    before = take_census()
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        assert any("child process" in leak for leak in leaked_since(before, patience=0))
    finally:
        child.communicate(b"\n")


async def test_a_task_is_named_until_it_is_done() -> None:
    loop = asyncio.get_running_loop()
    finish = asyncio.Event()
    task = asyncio.create_task(finish.wait(), name="forgotten")
    (leak,) = pending_tasks(loop)
    assert leak.startswith("task forgotten: ")
    finish.set()
    await task
    assert pending_tasks(loop) == []
