"""Keys of the control connection: their files, and who is let in by them.

A key pair is two files in the form that czmq and pyzmq use: ``NAME.key_secret`` for
its owner alone, and ``NAME.key``, which is given to the other side. The keys are
CURVE's: 32 bytes, written as 40 characters of Z85.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth

from kvxfer.errors import OptionError, UsageError
from kvxfer.options import Options

__all__ = [
    "CurveKeys",
    "KeyDirectory",
    "client_keys",
    "generate",
    "load_public",
    "load_secret",
    "server_keys",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}")
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_PUBLIC = ".key"
_SECRET = ".key_secret"
_GENERATE = "Make a key pair with `kvxfer keys generate NAME`."


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """What one side needs for an encrypted connection. No ``repr`` shows a secret.

    Attributes:
      public: This side's public key, Z85.
      secret: Its secret key, Z85.
      server: The public key of the server that is dialed; empty at the server.
      clients: Who may connect; ``None`` at the client.
    """

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes = b""
    clients: KeyDirectory | None = None


class KeyDirectory:
    """The public keys of those who may connect: one ``NAME.key`` file each.

    Files that come, change and go are noticed when somebody connects.

    Raises:
      OptionError: There is no such directory, or a file in it holds no key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._seen: dict[str, tuple[int, ...]] = {}
        self._names: dict[bytes, str] = {}
        self._load(self._list(), strict=True)

    def __repr__(self) -> str:
        return f"KeyDirectory({str(self.path)!r}, {len(self._names)} keys)"

    @property
    def names(self) -> Mapping[bytes, str]:
        """Names by public key, as of the last look."""
        return self._names

    def name_of(self, public: bytes) -> str:
        """Return whose key this is, empty if nobody's; looks at the files again."""
        try:
            found = self._list()
        except OptionError:
            found = {}  # a directory that is gone lets nobody in
        if found != self._seen:
            self._load(found, strict=False)
        return self._names.get(public, "")

    def _list(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(_PUBLIC) and entry.is_file():
                        info = entry.stat()
                        found[entry.name] = (
                            info.st_ino,
                            info.st_size,
                            info.st_mtime_ns,
                        )
        except OSError as error:
            raise OptionError(
                f"client_keys_dir {self.path}: {error.strerror}", hint=_GENERATE
            ) from error
        return found

    def _load(self, found: dict[str, tuple[int, ...]], *, strict: bool) -> None:
        names: dict[bytes, str] = {}
        for name in sorted(found):
            try:
                names[load_public(self.path / name)] = name[: -len(_PUBLIC)]
            except OptionError:
                if strict:
                    raise
                # A file that is being written is looked at again when it is done.
                found[name] = ()
        self._names = names
        self._seen = found


def generate(name: str, directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Make a key pair and write its two files.

    Args:
      name: Of the files, and of its owner in logs.
      directory: Is made, for its owner alone, if it does not exist.

    Returns:
      The paths of the public and of the secret file.

    Raises:
      UsageError: The name is none, a file is there already, or it cannot be
        written. Nothing was overwritten, and no half pair is left.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a key cannot be named {name!r}: letters, digits and _.@- are permitted, "
            "at most 128, a letter or digit first"
        )
    folder = Path(directory).expanduser()
    public_path, secret_path = folder / (name + _PUBLIC), folder / (name + _SECRET)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    text = f'curve\n    public-key = "{public}"\n'
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(secret_path, f'{text}    secret-key = "{secret}"\n', "secret")
        try:
            _write(public_path, text, "public")
        except OSError:
            secret_path.unlink()
            raise
    except FileExistsError as error:
        raise UsageError(
            f"{error.filename} is there already",
            hint="Choose another name, or remove both files of the old pair.",
        ) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    return public_path, secret_path


def _write(path: Path, text: str, kind: str) -> None:
    banner = {
        "secret": "# A secret key of kvxfer. It stays on this host; mode 0600.\n",
        "public": "# A public key of kvxfer. Give it to the other side.\n",
    }
    # Never there with a mode that lets others read, not even for a moment.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        try:
            file.write(banner[kind] + text)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


def _load(path: Path, option: str) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        reason = error.strerror or "no such file"
        raise OptionError(f"{option} {path}: {reason}", hint=_GENERATE) from error
    except ValueError as error:
        raise OptionError(f"{option} {path} holds no key", hint=_GENERATE) from error
    for key in filter(None, (public, secret)):
        if not _Z85.fullmatch(key.decode(errors="replace")):
            raise OptionError(f"{option} {path} holds no key", hint=_GENERATE)
    return public, secret


def load_public(key: str | os.PathLike[str], option: str = "key") -> bytes:
    """Return a public key: out of its file, or the 40 characters themselves.

    Raises:
      OptionError: It is neither.
    """
    text = os.fspath(key)
    if _Z85.fullmatch(text) and not os.path.exists(text):
        return text.encode()
    return _load(Path(text).expanduser(), option)[0]


def load_secret(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """Return public and secret key of a file that only its owner can read.

    Raises:
      OptionError: It holds no secret key, or others may read it.
    """
    place = Path(path).expanduser()
    public, secret = _load(place, "secret_key_file")
    if secret is None:
        raise OptionError(
            f"secret_key_file {place} holds a public key only",
            hint=f"The secret one is in the file that ends with {_SECRET}.",
        )
    if place.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise OptionError(
            f"secret_key_file {place} may be read by others than its owner",
            hint=f"`chmod 600 {place}`; if they may have read it, make a new pair.",
        )
    return public, secret


def server_keys(options: Options) -> CurveKeys | None:
    """Load what a server needs; ``None`` where no keys are configured.

    Raises:
      OptionError: Only one of the two options is set, or a file is not as it must be.
    """
    path, clients = options.secret_key_file, options.client_keys_dir
    if path is None and clients is None:
        return None
    if path is None or clients is None:
        missing = "secret_key_file" if path is None else "client_keys_dir"
        raise OptionError(
            f"a server with keys needs secret_key_file and client_keys_dir; "
            f"{missing} is not set",
            hint="Without its own key it can prove nothing; without a directory of "
            "public keys it would let everybody in.",
        )
    public, secret = load_secret(path)
    return CurveKeys(public, secret, clients=KeyDirectory(clients))


def client_keys(options: Options, server_key: str | None = None) -> CurveKeys | None:
    """Load what a client needs to dial one server; ``None`` without keys.

    Args:
      options: ``secret_key_file`` and ``server_public_key`` are used.
      server_key: This server's public key, instead of the option.

    Raises:
      OptionError: Only one of the two is set, or a file is not as it must be.
    """
    path = options.secret_key_file
    server = options.server_public_key if server_key is None else server_key
    if path is None and server is None:
        return None
    if path is None or server is None:
        missing = "secret_key_file" if path is None else "server_public_key"
        raise OptionError(
            f"a client with keys needs secret_key_file and the server's public key; "
            f"{missing} is not set",
            hint="The server's public key may also be given to connect().",
        )
    public, secret = load_secret(path)
    return CurveKeys(public, secret, server=load_public(server, "server_public_key"))
