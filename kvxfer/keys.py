"""``kvxfer keys``: make the keys that endpoints know each other by."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvxfer import curve
from kvxfer.errors import KVXferError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Keys by which servers and clients know each other."""


@main.command()
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the current one",
    help="Where to write; it is made if it does not exist.",
)
def generate(name: str, directory: Path) -> None:
    """Make a key pair: NAME.key_secret to keep, NAME.key to give away.

    A server reads its own secret file (secret_key_file) and a directory with the
    public files of its clients (client_keys_dir). A client reads its own secret file
    and the server's public one (server_public_key). Nothing is ever overwritten.
    """
    try:
        public, secret = curve.generate(name, directory)
    except KVXferError as error:
        click.echo(f"kvxfer: {error}", err=True)
        sys.exit(2)
    click.echo(f"public key, for the other side: {public}")
    click.echo(f"secret key, stays here:         {secret}")


if __name__ == "__main__":
    main(prog_name="kvxfer keys")
