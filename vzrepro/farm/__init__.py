"""Builds on other machines: an order says what is to be built, a workshop builds it from and to the shared cache, and a
queue carries orders; nothing that a queue says is believed.

`order` is what travels, `retries` what follows a failure, `workshop` a worker's side, `run` a client's, `livelog` the
lines of a build that is under way; `command` and `temporal/` are the queues. docs/farm.md describes it.
"""
