"""Which of this project's extras brings a package."""

from __future__ import annotations

from importlib import metadata

from starling.engine.installation import extra_packages

#: Extras without which a whole command cannot do its work, and what that is.
WHAT_FOR = {"export": "exporting", "serve": "serving", "ray": "a batch on Ray"}


def extra_of(module: str) -> str | None:
    """The extra that brings this module, whose import name is the distribution's with underscores; None for none."""
    for extra in WHAT_FOR:
        if module in {name.replace("-", "_") for name in extra_packages(extra)}:
            return extra
    return None


def require_extra(extra: str) -> None:
    """Raise ModuleNotFoundError for the first package of the extra that is not installed."""
    for name in extra_packages(extra):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ModuleNotFoundError(name=name.replace("-", "_")) from None
