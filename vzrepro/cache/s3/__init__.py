"""A binary cache in a bucket of any S3-compatible storage."""

from vzrepro.cache.s3.backend import S3Backend
from vzrepro.cache.s3.quirks import Quirks

__all__ = ["Quirks", "S3Backend"]
