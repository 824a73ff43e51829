"""What a user did wrong, said so that they can mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a command, the data or a run directory; commands print it without a traceback."""


def closest(name: object, options: Iterable[object]) -> str:
    """Like `nearest`, for options too many or too mixed to list (files of a folder)."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.75)
    return f" Did you mean {close[0]!r}?" if close else ""


def nearest(name: object, options: Iterable[object]) -> str:
    """A sentence that points from a wrong name to the closest valid one, or lists what there is."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Valid: {', '.join(names)}." if names else ""
