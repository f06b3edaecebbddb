#!/bin/sh
# Checks one profile's hardening inside the sandbox.
#
# in:  /in/checker.tar.gz        kernel-hardening-checker's source
#      /in/config/config         the kernel's configuration
#      /in/sysctl/sysctl.conf    what init sets
#      /in/src/                  this recipe's files
# out: /out/hardening-report.json
set -eu

mkdir checker
tar -xzf /in/checker.tar.gz -C checker --strip-components=1 --no-same-owner
python3 /in/src/check.py --checker checker --config /in/config/config --command-line /in/src/command-line \
    --sysctl /in/src/sysctl.defaults /in/sysctl/sysctl.conf --reasons /in/src/container.reasons \
    --out /out/hardening-report.json
