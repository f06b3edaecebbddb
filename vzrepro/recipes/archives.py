"""An initramfs: a newc archive that a manifest lists, whose bytes depend on nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vzrepro.recipe.dsl import beside, build, files
from vzrepro.recipe.graph import Node
from vzrepro.recipes.images import tools_image
from vzrepro.recipes.shipped import shipped


def newc_writer(name: str = "newc") -> Node:
    """The files of the archive's writer: `python3 /in/<input>/newc.py MANIFEST OUT`, for a build of one's own."""
    return files(name, shipped("initramfs", "newc.py"))


def initramfs(
    name: str = "initramfs",
    *,
    inputs: Mapping[str, Node],
    local_files: Sequence[str] = (),
    manifest: str = "manifest",
) -> Node:
    """The artifact `name`: /out/initramfs.img, what the file `manifest` beside the recipe lists.

    A line is `dir PATH MODE`, `file PATH MODE SOURCE`, `link PATH TARGET` or `node PATH MODE MAJOR MINOR`. A SOURCE is
    `/in/<input>/…`, or `/in/src/…` for `local_files`, which are beside the recipe, too.
    """
    tree = {**beside(manifest, *local_files), **shipped("initramfs", "newc.py")}
    return build(
        name,
        image=tools_image(),
        inputs={**inputs, "src": files(f"files-{name}", tree)},
        command=["python3", "/in/src/newc.py", f"/in/src/{manifest}", "/out/initramfs.img"],
    )
