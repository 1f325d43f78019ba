"""Command line of the example: ``python -m examples.inference_server``.

Runs until Ctrl-C; exit code 0 then, 1 if a server cannot be started or ends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from examples.split_llm.__main__ import ENVIRONMENT

CLOSE_SECONDS = 20.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    # Imported only now: they read the environment when they are imported.
    try:
        from examples.split_llm.model import gguf_path, prepare_checkpoint

        from .web import GRACE_SECONDS

        gguf_path()
    except ModuleNotFoundError as error:
        print(
            f"inference_server: {error}; scripts/inference-server installs it",
            file=sys.stderr,
        )
        return 1
    assert GRACE_SECONDS < CLOSE_SECONDS
    with ExitStack() as stack:
        checkpoints = options.checkpoints or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="inference-"))
        )
        try:
            checkpoint = prepare_checkpoint(checkpoints, _say)
            listener = _listen(options.host, options.port)
            stack.enter_context(listener)
            code = asyncio.run(_serve(options, checkpoint, listener))
        except OSError as error:
            print(f"inference_server: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            code = 0
    if code == 0:
        _say("stopped")
    return code


async def _serve(
    options: argparse.Namespace, checkpoint: Path, listener: socket.socket
) -> int:
    import httpx

    from examples.split_llm.model import Tokenizer

    from .proxy import Proxy, Upstream
    from .web import server_of

    arguments = (f"--checkpoint={checkpoint}", f"--blocks={options.blocks}")
    with (
        _child("prefill", options.host, *arguments) as prefill,
        _child("decode", options.host, *arguments) as decode,
    ):
        upstream = Upstream(prefill, decode)
        _say("loading the model")
        try:
            await upstream.connect()
        except httpx.HTTPError as error:
            await upstream.http.aclose()
            print(f"inference_server: a server ended: {error!r}", file=sys.stderr)
            return 1
        proxy = Proxy(upstream, Tokenizer(checkpoint), checkpoint.name)
        print(f"serving at {_url(listener)}", flush=True)
        await server_of(proxy.app).serve(sockets=[listener])
    return 0


@contextmanager
def _child(name: str, host: str, *arguments: str) -> Iterator[str]:
    """Run one server as a process of its own; give its address.

    The socket is made here, so the address is known before the server is there, and
    who asks too early waits.
    """
    with _listen(host, 0) as listener:
        url = _url(listener)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"{__package__}.{name}", *arguments),
                *(f"--host={host}", f"--fd={listener.fileno()}"),
            ],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            # Ctrl-C reaches a whole group, and is not theirs: see serve_child().
            start_new_session=True,
        )
    try:
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.inference_server",
        description="Serve a language model at /v1/completions, with prefill and "
        "decode in two processes and kvxfer between them. Ctrl-C ends it.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=8000, help="default: 8000; 0: any that is free"
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=512,
        metavar="N",
        help="blocks of 16 tokens that each side has (default: 512); requests wait "
        "for blocks in the order of their coming",
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="keep the unpacked model (540 MB) here and start faster next time",
    )
    return parser


def _say(text: str) -> None:
    print(f"inference_server: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
