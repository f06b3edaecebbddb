"""Fetching: where files are (`mirrors`), and what counts as having them (`download`, many at once in `crew`)."""

from vzrepro.sources.fetch.crew import Download, download_all
from vzrepro.sources.fetch.download import NotFound, Unreachable, download, get, served
from vzrepro.sources.fetch.mirroring import RetryPolicy
from vzrepro.sources.fetch.mirrors import ELSEWHERE, Mirrors, index_url

__all__ = [
    "ELSEWHERE",
    "Download",
    "Mirrors",
    "NotFound",
    "RetryPolicy",
    "Unreachable",
    "download",
    "download_all",
    "get",
    "index_url",
    "served",
]
