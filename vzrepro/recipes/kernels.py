"""An arm64 Linux kernel whose configuration is proven: what was asked for, and Kconfig dropped, fails the build.

Configured apart from the compilation: a request that was dropped costs seconds, and another reason or list that gives
the same configuration compiles nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vzrepro.recipe.dsl import beside, build, files, local, text
from vzrepro.recipe.graph import Node
from vzrepro.recipes.images import c_image, tools_image
from vzrepro.recipes.shipped import shipped


def kernel_config(
    name: str,
    *,
    linux: Node,
    profile: str,
    base: str,
    fragment: str,
    lists: Sequence[str] = (),
    capabilities: Mapping[str, Mapping[str, str]],
    forbidden: Sequence[str] = (),
) -> Node:
    """The artifact `name`: /out/config, the final configuration, and /out/capabilities.json, what it proves.

    `linux` is the kernel's source, `profile` a name for messages, `base` the make target that the fragment is merged
    onto (`allnoconfig`, `defconfig`). Beside the recipe are `fragment`, the symbols asked for, and `lists` of symbols
    that the result is held against, each exception with its reason. `capabilities` maps a name to the symbols (without
    CONFIG_) and values that prove it; `forbidden` symbols must be off.
    """
    own = beside(fragment, *lists)
    requirements = {
        "profile": profile,
        "base": base,
        "fragment": fragment,
        "lists": list(lists),
        "capabilities": {key: dict(symbols) for key, symbols in capabilities.items()},
        "forbidden": list(forbidden),
    }
    return build(
        name,
        version=linux.version,
        image=c_image(),
        inputs={
            "linux.tar.xz": linux,
            "src": files("files-kernel", {**own, **shipped("kernel", "configure.sh", "check_config.py")}),
            "requirements.json": text("requirements.json", json.dumps(requirements, sort_keys=True)),
        },
        command=["sh", "/in/src/configure.sh"],
        build_only=["linux.tar.xz"],
    )


def dotconfig(name: str, *, config: Node) -> Node:
    """The artifact `name`: the configuration of a `kernel_config` alone. A kernel is compiled from nothing else, so
    that one capability more compiles no kernel."""
    return build(
        name, image=tools_image(), inputs={"config": config}, command=["cp", "/in/config/config", "/out/config"]
    )


def kernel(name: str, *, linux: Node, config: Node, patches: Sequence[str] = ()) -> Node:
    """The artifact `name`: /out/vmlinux (the raw arm64 Image), config, System.map and report.json (sizes).

    `config` is a `dotconfig`; `patches` are files beside the recipe that apply without fuzz.
    """
    return build(
        name,
        version=linux.version,
        image=c_image(),
        inputs={
            "linux.tar.xz": linux,
            "config": config,
            "src": files("files-kernel", shipped("kernel", "build.sh")),
            **({"patches": local(*patches, name=f"{name}-patches")} if patches else {}),
        },
        command=["sh", "/in/src/build.sh"],
        build_only=["src"],
        timeout_secs=3 * 3600,
    )
