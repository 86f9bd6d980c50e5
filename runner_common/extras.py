"""Advice on extras of this package that are not installed."""

from __future__ import annotations


def install_advice(*extras: str) -> str:
    """Return how to install this package with extras, from a checkout or an index."""
    names = ",".join(extras)
    plural = "s" if len(extras) > 1 else ""
    return (
        f"install mlx-grpc-runner with the extra{plural} {names} "
        f"(from a checkout: pip install '.[{names}]')"
    )
