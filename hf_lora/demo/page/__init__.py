"""The page: tabs over a `Demo`, and the named endpoints of its API."""

from .build import CSS, build, theme

__all__ = ["CSS", "build", "theme"]
