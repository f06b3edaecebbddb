"""What all tests share."""

PATIENCE_SECS = 300.0
"""How long to wait for what another thread or process does at once: only what is broken meets it."""
