"""Signed statements about what was built, rebuilt and verified (docs/formats.md, "Attestations").

`dsse` is the envelope, `statement` what is in it, `provenance`, `audit` and `vsa` the three kinds that are made here,
`shelf` where they are kept on this machine.
"""
