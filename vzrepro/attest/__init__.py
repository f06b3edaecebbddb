"""Signed statements about what was built, rebuilt and verified (docs/formats.md, "Attestations").

`dsse` is the envelope, `statement` what is in it; `provenance`, `audit` and `vsa` are the three kinds that are made
here. `witness` makes provenance of what this machine has built, `shelf` keeps envelopes beside the store, `review` says
of an envelope who signed it and what it says. `policy` says who may vote,
`ballots` which envelopes are votes, `votes` which result holds.
"""
