"""Numbers as people read them, for the console, the report and the model card. Nothing is parsed back."""


def number(value: float | None) -> str:
    """Four digits: `0.04213`."""
    return "–" if value is None else f"{value:.4g}"


def count(value: float) -> str:
    """How many: `805.3 M`."""
    return _scaled(value, ((1e9, "B"), (1e6, "M"), (1e3, "k")), ".1f")


def size(nbytes: float | None) -> str:
    """Bytes: `98.00 MB`, a million bytes to the MB."""
    if nbytes is None:
        return "–"
    return _scaled(nbytes, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B")), ".2f")


def duration(seconds: float | None) -> str:
    """Seconds below two minutes, then minutes, then hours: `8.1 s`, `17 min`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _scaled(value: float, units: tuple[tuple[float, str], ...], digits: str) -> str:
    for unit, name in units:
        if value >= unit > 0:
            return f"{value / unit:{digits}} {name}"
    return f"{value:.0f} {units[-1][1]}" if units[-1][0] == 0 else f"{value:.0f}"
