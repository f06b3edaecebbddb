"""Signed statements about what was built, rebuilt and verified (docs/formats.md, "Attestations").

`dsse` is the envelope, `statement` what is in it; `provenance`, `audit` and `vsa` are the three kinds that are made
here. `signers` says whose a signature is, `review` of an envelope what it says. `witness` makes provenance of what this
machine has built, `shelf` keeps envelopes beside the store. `policy` says who may vote, `ballots` which envelopes are
votes, `votes` which result holds, `verify` whether files are that result. `evidence` is what caches keep of builders'
results, `challenge` compares it.
"""
