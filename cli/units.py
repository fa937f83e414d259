"""Bytes and times as people read them."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Three digits and a decimal unit: 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def used_text(used: int | None, of: int | None) -> str:
    """Used and whole, in GB; nothing if they are not known."""
    return "" if used is None or of is None else f"{used / 1e9:.1f}/{of / 1e9:.3g}"


def ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.0f}:1" if ratio >= 10 else f"{ratio:.2g}:1"


def age_text(seconds: float) -> str:
    if seconds < -1:
        return f"{-seconds:.0f} s ahead"  # the clock was set back since
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
