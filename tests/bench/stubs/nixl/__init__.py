"""Stands for NIXL's wheel."""
