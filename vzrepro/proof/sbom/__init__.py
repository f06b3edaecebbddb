"""What a target is made of, as a software bill of materials: components, licences, CycloneDX and SPDX, comparison.

docs/sbom.md says what is listed, how it is related, and why the same graph gives the same bytes on every machine.
"""
