"""rot13: a filter in C, static."""

from vzrepro import build, local
from vzrepro.recipes import c_image

ROT13 = build(
    "rot13",
    version="1.0",
    image=c_image(),
    inputs={"src": local("rot13.c")},
    command=[
        *("gcc", "-std=c17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-Wl,--build-id=none"),
        *("-o", "/out/rot13", "/in/src/rot13.c"),
    ],
    linked=["libc6-dev"],
)
