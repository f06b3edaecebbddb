"""What audits put into a sandbox: `vary` and `look` observe, `hold.so` holds the clock and randomness."""

from recipes.toolchain import C_IMAGE
from vzrepro import build, local

AUDIT_TOOLS = build(
    "audit-tools",
    image=C_IMAGE,
    inputs={"src": local("hold.c", "look.c", "vary.c")},
    command=[
        "sh",
        "-euc",
        'compile() { gcc -std=gnu17 -O2 -Wall -Wextra -Werror -s -Wl,--build-id=none "$@"; }; '
        "compile -static -o /out/vary /in/src/vary.c; "
        "compile -o /out/look /in/src/look.c; "
        "compile -shared -fPIC -o /out/hold.so /in/src/hold.c",
    ],
)
"""`vary` (static), `look` and `hold.so` (for glibc), all x86-64."""
