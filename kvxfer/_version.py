"""The version, in one place: packaging and the handshake read it here."""

__version__ = "0.1.0.dev0"
