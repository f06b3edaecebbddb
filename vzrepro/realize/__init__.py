"""Makes what was asked for valid in the store: builds, downloads, order and transfers."""
