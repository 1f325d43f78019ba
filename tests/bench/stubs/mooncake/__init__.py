"""Stands for Mooncake's wheel."""
