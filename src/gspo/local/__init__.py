"""ART's place of `LocalBackend`."""

from gspo.backend.local import LocalBackend

__all__ = ["LocalBackend"]
