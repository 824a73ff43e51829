"""What a user's mistake must say, word for word."""

import re

import pytest

from tfm_jax.errors import UserError


def says(message):
    """`with says(text)`: a `UserError` with exactly this text is raised."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")
