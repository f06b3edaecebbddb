"""Reproducibility audits: rebuild beside the store, vary one axis at a time, name what leaks, sign what was found.

`axes` says what can be varied and how that is proven, `engine` rebuilds and judges, `diff` and `guess` explain a
difference, `page` shows a report; docs/audit.md is the guide.
"""
