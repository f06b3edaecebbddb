"""hello: one static program, from one file of C."""

from vzrepro import build, local
from vzrepro.recipes import c_image

HELLO = build(
    "hello",
    version="1.0",
    image=c_image(),
    inputs={"src": local("hello.c")},
    command=[
        *("gcc", "-std=c17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"),
        # A build id would be the same for the same bytes; without one there is nothing to think about.
        *("-Wl,--build-id=none", "-o", "/out/hello", "/in/src/hello.c"),
    ],
    linked=["libc6-dev"],
)
