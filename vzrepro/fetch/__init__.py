"""Fetching: where files are (`mirrors`), and what counts as having them (`download`)."""

from vzrepro.fetch.download import (
    Download,
    NotFound,
    Patience,
    download,
    download_all,
    get,
    served,
)
from vzrepro.fetch.mirrors import Mirrors, index_url
from vzrepro.wire import Http

__all__ = [
    "Download",
    "Http",
    "Mirrors",
    "NotFound",
    "Patience",
    "download",
    "download_all",
    "get",
    "index_url",
    "served",
]
