"""Durations, sizes and counts as people read them, in tables, logs and pages."""

from __future__ import annotations


def duration(secs: float) -> str:
    """`secs` for people: `45ms`, `3.2s`, `32s`, `2m03s`, `1h02m`."""
    if secs < 0.0995:
        return f"{max(secs, 0) * 1000:.0f}ms"
    if secs < 9.95:
        return f"{secs:.1f}s"
    whole = round(secs)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def size(count: int) -> str:
    """`count` bytes for people, three digits, decimal units: `999 B`, `1.00 kB`, `45.2 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        for limit, digits in ((9.995, 2), (99.95, 1), (999.5, 0)):
            if value < limit:
                return f"{value:.{digits}f} {unit}"
    return f"{value:.0f} TB"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 node`, `15 nodes`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def in_words(value: object) -> str:
    """A value of a JSON document, for who reads text: lists are joined, truth is yes or no, nothing is `-`."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
