"""The inference server of the examples: many readers, some of whom go away."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.patience import patient
from tests.test_demo_llm import CHECKPOINTS, REASON, ROOT


def _absent() -> str | None:
    """Say in words what the example lacks here, or None."""
    for module in ("starlette", "uvicorn", "httpx"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; scripts/inference-server installs it"
    return REASON


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_absent() is not None, reason=_absent() or ""),
]

N_BLOCKS = 128
LONG = patient(240.0)
#: 1500 tokens or so: seconds of work for the prefill server.
ENDLESS = "The quick brown fox jumps over the lazy dog. " * 150


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Run the example, and end it with Ctrl-C."""
    command = [
        *(sys.executable, "-m", "examples.inference_server", "--port=0"),
        *(f"--checkpoints={CHECKPOINTS}", f"--blocks={N_BLOCKS}"),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(LONG, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("serving at http://"), process.stderr.read()
            yield line.split()[-1]
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            assert process.wait() == 0, said
            assert "Traceback" not in said and said.endswith("stopped\n"), said
        finally:
            watchdog.cancel()
            process.kill()


def ask(prompt: str, **more: Any) -> dict[str, Any]:
    """Make the body of a request."""
    return {"prompt": prompt, "max_tokens": 12, **more}


async def streamed_text(client: Any, prompt: str) -> str:
    """Read a streamed answer to its end."""
    body = ask(prompt, stream=True)
    text, reasons = "", []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [x async for x in answer.aiter_lines() if x]
    assert events.pop() == "data: [DONE]"
    for event in events:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        text += choice["text"]
        reasons.append(choice["finish_reason"])
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
    return text


async def whole_text(client: Any, prompt: str) -> str:
    """Ask without streaming."""
    answer = await client.post("/v1/completions", json=ask(prompt))
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return str(answer.json()["choices"][0]["text"])


async def _check_many(client: Any) -> None:
    prompts = ["The capital of France is", "Once upon a time", "1, 2, 3,"]
    texts = await asyncio.gather(
        *(read(client, p) for p in prompts for read in (streamed_text, whole_text))
    )
    assert texts[0::2] == texts[1::2], "streamed and whole differ"
    assert texts[0::2] == await asyncio.to_thread(_expected, prompts)
    assert "Paris" in texts[0]


def _expected(prompts: list[str]) -> list[str]:
    from examples.split_llm.model import Model, Tokenizer, prepare_checkpoint

    checkpoint = prepare_checkpoint(CHECKPOINTS, print)
    model, tokenizer = Model(checkpoint), Tokenizer(checkpoint)
    return [
        tokenizer.decode(model.run_whole(tokenizer.encode(prompt), 12))
        for prompt in prompts
    ]


async def _stats(client: Any) -> Any:
    return (await client.get("/stats")).json()


async def _check_leaving(client: Any) -> None:
    """A reader who goes away takes the transfer along, on both sides."""
    before = await _stats(client)
    for n_left, stream in enumerate((True, False), start=1):
        reading = asyncio.ensure_future(
            client.post("/v1/completions", json=ask(ENDLESS, stream=stream))
        )
        while "streaming" not in (await _stats(client))["prefill"]["under_way"]:
            assert not reading.done()
        reading.cancel()
        await asyncio.wait({reading})
        # Else "streaming" could be said of this one when the next is asked for.
        while (await _stats(client))["prefill"]["ended"].get("aborted", 0) < n_left:
            pass
    while (now := await _stats(client))["prefill"]["under_way"] or (
        now["decode"]["free_blocks"] < N_BLOCKS
        or now["prefill"]["free_blocks"] < N_BLOCKS
    ):
        pass  # each look is a request, so this waits for the servers
    for side in ("prefill", "decode"):
        assert now[side]["ended"]["aborted"] == 2, now
        assert now[side]["ended"]["done"] == before[side]["ended"]["done"]
    assert "Paris" in await whole_text(client, "The capital of France is")


async def _check_mistakes(client: Any) -> None:
    for body, word in (
        ({"max_tokens": 4}, "prompt"),
        (ask("x", temperature=0.7), "greedy"),
        (ask("x", max_tokens=5000), "at most 2048"),
        (ask("x", max_tokens=0), "at least 1"),
        (ask(""), "empty"),
        (ask("x", model="another"), "no model 'another'"),
    ):
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["id"].startswith("SmolLM2")


@pytest.mark.leaky("torch and its thread pools stay")
def test_many_readers_some_of_whom_go_away() -> None:
    import httpx

    async def check(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=LONG) as client:
            await _check_mistakes(client)
            await _check_many(client)
            await _check_leaving(client)

    with serving() as url:
        asyncio.run(asyncio.wait_for(check(url), LONG))


def test_a_port_that_is_taken_is_said() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "examples.inference_server"),
                *(f"--port={taken.getsockname()[1]}", f"--checkpoints={CHECKPOINTS}"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )
    assert run.returncode == 1
    assert "Address already in use" in run.stderr and "Traceback" not in run.stderr
