"""What audits put into a sandbox: `vary` and `look` observe, `hold.so` holds the clock and randomness, and a locale."""

from recipes.toolchain import C_IMAGE
from vzrepro import build, local

AUDIT_TOOLS = build(
    "audit-tools",
    image=C_IMAGE,
    inputs={"src": local("hold.c", "locale.src", "look.c", "utf8.charmap", "vary.c")},
    command=[
        "sh",
        "-euc",
        'compile() { gcc -std=gnu17 -O2 -Wall -Wextra -Werror -s -Wl,--build-id=none "$@"; }; '
        "compile -static -o /out/vary /in/src/vary.c; "
        "compile -o /out/look /in/src/look.c; "
        "compile -shared -fPIC -o /out/hold.so /in/src/hold.c; "
        "localedef --no-archive --no-hard-links -f /in/src/utf8.charmap -i /in/src/locale.src /out/locale",
    ],
)
"""`vary` (static), `look`, `hold.so` and `locale/` (for glibc), all x86-64."""
