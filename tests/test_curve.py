"""Key files: how they are made, and which are taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq
import zmq.auth
from click.testing import CliRunner

from kvxfer import curve, keys
from kvxfer.errors import OptionError, UsageError
from kvxfer.options import Options


def test_a_pair_fits_and_its_secret_is_its_owners(tmp_path: Path) -> None:
    public, secret = curve.generate("decode-0", tmp_path / "keys")
    assert (public.name, secret.name) == ("decode-0.key", "decode-0.key_secret")
    assert [path.stat().st_mode & 0o777 for path in (public, secret)] == [0o600] * 2
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    loaded = curve.load_secret(secret)
    assert loaded[0] == curve.load_public(public) == zmq.curve_public(loaded[1])
    assert zmq.auth.load_certificate(secret) == loaded  # other tools read it too
    assert loaded[1] not in public.read_bytes()
    assert curve.load_public(loaded[0].decode()) == loaded[0]


@pytest.mark.parametrize("there", ["a.key", "a.key_secret"])
def test_nothing_is_overwritten_and_no_half_pair_is_left(
    tmp_path: Path, there: str
) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(UsageError, match=f"{there} is there already"):
        curve.generate("a", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "ä", "x" * 129])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be named"):
        curve.generate(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    arguments = ["generate", "prefill-3", "--dir", str(tmp_path / "k")]
    first = CliRunner().invoke(keys.main, arguments)
    assert first.exit_code == 0
    assert str(tmp_path / "k" / "prefill-3.key_secret") in first.stdout
    secret = curve.load_secret(tmp_path / "k" / "prefill-3.key_secret")[1]
    assert secret.decode() not in first.output
    second = CliRunner().invoke(keys.main, arguments)
    assert second.exit_code == 2 and "is there already" in second.stderr
    assert second.stdout == ""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_may_reach_is_not_used(tmp_path: Path, mode: int) -> None:
    _, secret = curve.generate("a", tmp_path)
    secret.chmod(mode)
    with pytest.raises(OptionError, match="chmod 600"):
        curve.load_secret(secret)


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    public, _ = curve.generate("a", tmp_path)
    with pytest.raises(OptionError, match="holds a public key only"):
        curve.load_secret(public)
    with pytest.raises(OptionError, match="no such file"):
        curve.load_public(tmp_path / "none.key", "server_public_key")
    for text in ("", "public-key = tooshort", "public-key = " + "\x00" * 40):
        (tmp_path / "bad.key").write_text(text)
        with pytest.raises(OptionError, match="holds no key"):
            curve.load_public(tmp_path / "bad.key")
    with pytest.raises(OptionError, match=r"bad\.key holds no key"):
        curve.KeyDirectory(tmp_path)
    with pytest.raises(OptionError, match="client_keys_dir"):
        curve.KeyDirectory(tmp_path / "none")


def test_keys_come_and_go(tmp_path: Path) -> None:
    directory = curve.KeyDirectory(tmp_path)
    public, secret = curve.generate("a", tmp_path)
    key = curve.load_public(public)
    assert directory.name_of(key) == "a"
    public.rename(tmp_path / "b.key")
    assert directory.name_of(key) == "b"
    (tmp_path / "half.key").write_text("")  # being written: nobody else is locked out
    assert directory.name_of(key) == "b"
    os.replace(tmp_path / "b.key", tmp_path / "half.key")
    assert directory.name_of(key) == "half"
    (tmp_path / "half.key").unlink()
    assert directory.name_of(key) == ""
    secret.unlink()
    tmp_path.rmdir()
    assert directory.name_of(key) == ""


def test_half_a_configuration_is_refused(tmp_path: Path) -> None:
    public, secret = curve.generate("a", tmp_path)
    only_secret = Options(secret_key_file=str(secret))
    with pytest.raises(OptionError, match="client_keys_dir is not set"):
        curve.server_keys(only_secret)
    with pytest.raises(OptionError, match="server_public_key is not set"):
        curve.client_keys(only_secret)
    with pytest.raises(OptionError, match="secret_key_file is not set"):
        curve.server_keys(Options(client_keys_dir=str(tmp_path)))
    with pytest.raises(OptionError, match="secret_key_file is not set"):
        curve.client_keys(Options(), str(public))
    assert curve.server_keys(Options()) is None is curve.client_keys(Options())


def test_no_repr_shows_a_secret(tmp_path: Path) -> None:
    public, secret = curve.generate("a", tmp_path)
    made = curve.client_keys(Options(secret_key_file=str(secret)), str(public))
    assert made is not None and made.secret == curve.load_secret(secret)[1]
    assert made.secret.decode() not in repr(made)
