"""The recipe DSL: plain functions that a recipe module calls, each giving a frozen `Node` of the graph.

Everything a recipe can say is here; docs/recipes.md is the guide. The functions work only while
`vzrepro.recipe.evaluate` runs a recipe: they find its workspace, its lock and its registry in the current
`EvaluationContext`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from vzrepro import nar
from vzrepro.base.errors import UsageError
from vzrepro.base.model import (
    GIT_FORMAT,
    IMAGE_FORMAT,
    SOURCE_DATE_EPOCH,
    UNPACK_FORMAT,
    Derivation,
    Digest,
    FileHash,
    canonical_json,
    store_name,
)
from vzrepro.recipe.declaring import (
    add,
    check_relative,
    current,
    download,
    empty,
    make_node,
    part,
    pinned,
    read_file,
    require_lists,
    require_texts,
)
from vzrepro.recipe.graph import Node, Want, WantKind
from vzrepro.recipe.lock import CrateSetPin, ImagePin, PinnedFile, PinnedTree, SourcePin

LOCAL_IGNORED = frozenset({"__pycache__", "target", ".DS_Store", ".git"})
"""Names that `local` leaves out of a directory: what tools drop into source trees."""


def build(
    name: str,
    *,
    image: Node,
    command: Sequence[str],
    inputs: Mapping[str, Node],
    version: str | None = None,
    env: Mapping[str, str] | None = None,
    source_date_epoch: int = SOURCE_DATE_EPOCH,
    timeout_secs: int = 3600,
    memory_gib: int = 8,
    disk_gib: int | None = None,
    build_only: Sequence[str] = (),
    linked: Sequence[str] = (),
    constant: Mapping[str, str] | None = None,
) -> Node:
    """An artifact built in the sandbox: `command` runs in `image` and sees each input at `/in/<input name>`.

    What the command leaves in `/out` is the store object `<hash>-<name>[-<version>]`; what no store name may hold in a
    version, such as `~`, is `_` there. `timeout_secs`, `memory_gib` and `disk_gib` (/build and /out together; None:
    what the user's configuration allows) limit the build and stay outside its hash.

    So do these two, which are for `vzrepro sbom`. `build_only` names inputs of which nothing is in the output: scripts
    that run, proofs that are looked at; every other input counts as contained. `linked` names packages of the image
    (`name` or `name:arch`) of which something is in the output, such as static libraries; no other counts as contained.

    `constant` is for `vzrepro audit`, and outside the hash, too: it maps an axis, such as `build-path`, to the reason
    why this recipe relies on what the sandbox makes of it. That is then not varied, and reported as held constant.
    """
    context = current()
    place = context.place()
    for key, value in inputs.items():
        if not isinstance(value, Node):
            raise UsageError(f"{place}: input {key!r} is {type(value).__name__}, not a recipe, source, local or text")
        if key in ("", ".", "..") or "/" in key or "\0" in key:
            raise UsageError(f"{place}: {key!r} cannot be the name of an input: it is a name below /in")
    require_lists(place, command=command, build_only=build_only, linked=linked)
    require_texts(place, name=name, version=version)
    if image.kind != "image":
        raise UsageError(f"{place}: image {image.target!r} is not an image")
    if not command:
        raise UsageError(f"{place}: {name!r} has an empty command")
    if foreign := sorted(set(build_only) - inputs.keys()):
        raise UsageError(f"{place}: build_only names {', '.join(foreign)}, which {name!r} has no input of")
    for axis, why in (constant or {}).items():
        if not isinstance(why, str) or not why.strip():
            raise UsageError(f"{place}: constant: {axis!r} needs a reason: a line that the audit's report repeats")
    drv = Derivation(
        name=store_name(f"{name}-{version}") if version else name,
        builder="sandbox",
        version=version,
        platform=image.drv.platform,
        image=image.drv_hash,
        command=tuple(command),
        env=dict(env or {}),
        inputs={key: node.drv_hash for key, node in inputs.items()},
        source_date_epoch=source_date_epoch,
    )
    return add(
        make_node(
            name,
            "recipe",
            drv,
            place,
            timeout_secs=timeout_secs,
            memory_bytes=memory_gib << 30,
            disk_bytes=None if disk_gib is None else disk_gib << 30,
            build_only=build_only,
            linked=[file for package in linked for file in _deb_files(image, package, place)],
            constant=constant,
        )
    )


def _deb_files(image: Node, package: str, place: str) -> list[str]:
    """The .deb of `package` (`name` or `name:arch`) in `image`; maybe none while pins may be out of date."""
    context = current()
    files = context.parts[image.drv.inputs["debs"]].files
    wanted, _, arch = package.partition(":")
    # Pool names are <package>_<version>_<architecture>.deb, and none of the three has an underscore.
    parts = {file: file.removesuffix(".deb").split("_") for file in files}
    found = [file for file, words in parts.items() if words[0] == wanted and arch in ("", words[-1])]
    if len(found) != 1 and not context.lenient:
        what = "several architectures of" if found else "no package"
        raise UsageError(f"{place}: linked: {image.target} has {what} {package!r}", hint="name:arch names exactly one")
    return found


def debian_image(
    name: str,
    *,
    suite: str,
    packages: Sequence[str],
    foreign: Sequence[str] = (),
    without: Mapping[str, str] | None = None,
    alternatives: bool = False,
    links: Mapping[str, str] | None = None,
) -> Node:
    """A toolchain image: `packages` of a Debian `suite` and what they depend on, unpacked.

    `foreign` packages (`name:arch`) come without their dependencies: static libraries for cross builds.
    `without` maps a package that is left out to the reason why that is safe. The exact .debs are in the lock.

    `alternatives` makes the links that the packages' maintainer scripts would have `update-alternatives` make, as far
    as they say them in plain words. `links` maps further absolute paths to what they lead to in the image.
    """
    context = current()
    place = context.place()
    require_texts(place, name=name, suite=suite)
    require_lists(place, packages=packages, foreign=foreign)
    want = Want(
        "image",
        name,
        place,
        {
            "platform": context.platform,
            "suite": suite,
            "packages": sorted(packages),
            "foreign": sorted(foreign),
            "without": sorted(without or {}),
        },
    )
    pin: ImagePin | None = pinned(want, context.lock.images.get((name, context.platform)))
    files = {PurePosixPath(deb.file.url).name: deb.file for deb in pin.debs} if pin else {}
    debs = download(f"debs-{name}", None, files, place)
    env = {"image_format": str(IMAGE_FORMAT)}
    if alternatives is not False:
        if alternatives is not True:
            raise UsageError(f"{place}: alternatives= is True or False", hint="single links are named by links={…}")
        env["alternatives"] = "1"
    if links:
        for each in (*links, *links.values()):
            if not each.startswith("/") or any(part in ("", ".", "..") for part in each[1:].split("/")) or "\0" in each:
                raise UsageError(f"{place}: link's path {each!r} must be an absolute path without '.' or '..'")
        env["links"] = canonical_json(links).decode()
    drv = Derivation(
        name=f"image-{name}",
        builder="image",
        platform=context.platform,
        env=env,
        inputs={"debs": debs.drv_hash},
    )
    return add(make_node(f"image-{name}", "image", drv, place))


def debian_source(name: str, *, series: str, suite: str) -> Node:
    """The upstream tarball of a Debian source package, the newest of `series` (`6.12`) when it was locked."""
    return _source("debian-source", name, {"series": series, "suite": suite})


def crate_source(name: str, *, series: str) -> Node:
    """A published crate's tarball, the newest of `series` (`0.7`) when it was locked."""
    return _source("crate-source", name, {"series": series})


def _source(kind: WantKind, name: str, ask: Mapping[str, object]) -> Node:
    place = current().place()
    require_texts(place, name=name, **ask)
    want = Want(kind, name, place, ask)
    pin: SourcePin | None = pinned(want, current().lock.sources.get(want.name))
    if pin is None:
        return add(empty(f"source-{want.name}", want.place))
    assert isinstance(pin.file, PinnedFile)
    file_name = PurePosixPath(pin.file.url).name
    if want.kind == "crate-source":
        file_name = f"{want.name}-{pin.version}.crate"
    return download(f"source-{want.name}", file_name, {"": pin.file}, want.place, version=pin.version)


def pypi_source(name: str, *, series: str, wheel: str | None = None) -> Node:
    """A published Python package: its source distribution, the newest of `series` (`3.7`) when it was locked; with
    `wheel`, a tag such as `py3-none-any`, the wheel of that."""
    return _source("pypi-source", name, {"series": series, "wheel": wheel})


def url_source(
    name: str,
    *urls: str,
    sha256: str | None = None,
    version: str | None = None,
    series: str | None = None,
    unpack: bool = False,
    signature: str | None = None,
    key: str | None = None,
) -> Node:
    """The file at `urls`, which are places of the same bytes, best first; with `unpack`, the tree in that tar or zip.

    Without `sha256` (hex, or `sha256-…` as SRI) the lock has the hash. `{version}` in URLs stands for `version`, or for
    the newest of `series` that the directory had when it was locked. `signature` is the URL of a signature by a key in
    the file `key` beside the recipe: OpenPGP or minisign, looked at when the file is locked.
    """
    context = current()
    place = context.place()
    require_texts(place, name=name, sha256=sha256, version=version, series=series, signature=signature, key=key)
    if not urls:
        raise UsageError(f"{place}: {name!r} has no URL")
    for url in (*urls, *filter(None, [signature])):
        if not isinstance(url, str):
            raise UsageError(
                f"{place}: a URL of {name!r} is {type(url).__name__}, not text",
                hint=f"several are arguments of their own: url_source({name!r}, URL, URL, …)",
            )
        _check_url(url, place, ("http", "https", "file", "mirror"))
        if found := re.search(r"\{[^{}]*\}?|\}", url.replace("{version}", "")):
            raise UsageError(
                f"{place}: {url} has {found[0]} in it, and only {{version}} stands for something",
                hint="braces that are meant so are %7B and %7D",
            )
        if "{version}" in url and version is None and series is None:
            raise UsageError(f"{place}: {url} has {{version}} in it", hint="give version= or series=")
    if series is not None and (sha256 is not None or version is not None or "{version}" not in urls[0]):
        raise UsageError(
            f"{place}: series= of {name!r} is for a URL with {{version}} in it, whose version and hash are not given",
            hint="give version= and sha256= instead of series= to name exactly one",
        )
    if (signature is None) != (key is None):
        raise UsageError(f"{place}: {name!r} has only one of signature= and key=")
    try:
        wanted = None if sha256 is None else FileHash.parse(_small_hex(sha256))
    except ValueError as error:
        raise UsageError(f"{place}: sha256 of {name!r}: {error}") from None
    if wanted is not None and signature is None:
        places = [url.replace("{version}", version or "") for url in urls]
        return _file_node(name, PinnedFile(places[0], wanted, None, tuple(places[1:])), version, unpack, place)
    ask: dict[str, object] = {
        "urls": list(urls),
        "version": version,
        "series": series,
        "sha256": None if wanted is None else wanted.hex,
    }
    if key is not None:
        check_relative(key, place, "key file")
        file = context.folder() / key
        digest = hashlib.sha256(read_file(file, place)).hexdigest()
        ask |= {"signature": signature, "key": file.relative_to(context.root).as_posix(), "key_sha256": digest}
    want = Want("url-source", name, place, ask, unpack)
    pin: SourcePin | None = pinned(want, context.lock.sources.get(name))
    if pin is None or not isinstance(pin.file, PinnedFile):
        return add(empty(f"source-{name}", place))
    others = tuple(url.replace("{version}", pin.version) for url in urls[1:])
    return _file_node(name, replace(pin.file, others=others), pin.version or None, unpack, place)


def _small_hex(sha256: str) -> str:
    """Some publish hashes in capitals; other notations have a meaning for them."""
    return sha256.lower() if re.fullmatch("(sha256:)?[0-9A-Fa-f]{64}", sha256) else sha256


def _file_node(name: str, file: PinnedFile, version: str | None, unpack: bool, place: str) -> Node:
    if unpack:
        file_name, env = f"{name}-{version}" if version else name, {"unpack": str(UNPACK_FORMAT)}
    else:
        file_name, env = PurePosixPath(unquote(urlsplit(file.url).path)).name or name, {}
    return download(f"source-{name}", file_name, {"": file}, place, version=version, env=env)


def git_source(
    name: str, url: str, *, rev: str | None = None, tag: str | None = None, submodules: bool = False
) -> Node:
    """The tree of one commit of the repository at `url`, without git's own files; with `submodules`, theirs too.

    `rev` is a commit's full id. `tag` is a tag; with a `*` in it, which stands for a number with dots, the newest such
    tag when it was locked. The lock has the commit and the tree's hash.
    """
    context = current()
    place = context.place()
    require_texts(place, name=name, url=url, rev=rev, tag=tag)
    _check_url(url, place, ("http", "https", "file", "mirror"))
    if (rev is None) == (tag is None):
        raise UsageError(f"{place}: {name!r} needs one of rev= and tag=")
    if rev is not None and not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", rev):
        raise UsageError(
            f"{place}: rev {rev!r} is not the full id of a commit",
            reason="a branch or a shortened id means another commit tomorrow",
            hint=f"git ls-remote {url}",
        )
    if tag is not None and (tag.startswith("-") or not tag.isprintable() or re.search(r"[ ~^:?\[\\]|\.\.", tag)):
        raise UsageError(f"{place}: {tag!r} is no name of a tag, nor a pattern of one")
    ask: dict[str, object] = {"url": url, "rev": rev, "tag": tag, "submodules": submodules}
    want = Want("git-source", name, place, ask)
    pin: SourcePin | None = pinned(want, context.lock.sources.get(name))
    if pin is None or not isinstance(pin.file, PinnedTree):
        return add(empty(f"source-{name}", place))
    drv = Derivation(
        name=store_name(f"{name}-{pin.version}"),
        builder="fetch",
        version=pin.version,
        env={"git": str(GIT_FORMAT)},
        content={"": pin.file.nar_hash},
    )
    return add(make_node(f"source-{name}", "source", drv, place, checkout=replace(pin.file, submodules=submodules)))


def _check_url(url: str, place: str, schemes: Sequence[str]) -> None:
    secret, why = "", None
    try:
        parsed = urlsplit(url)
        secret = str(parsed.hostname) if "@" in parsed.netloc else ""
        bad = parsed.scheme not in schemes or not url.isprintable() or " " in url
        bad = bad or (parsed.scheme in ("http", "https") and not parsed.hostname)
        bad = bad or parsed.port == 0  # and a ValueError for what is no port
    except ValueError as error:
        bad, why = True, str(error)
    if secret:
        raise UsageError(
            f"{place}: the URL of {secret} holds a user or password",
            hint="name the place in the configuration instead: mirrors, and mirror://NAME/PATH here",
        )
    if bad:
        raise UsageError(f"{place}: {url!r} is not a URL of {', '.join(schemes)}", reason=why)


def cargo_crates(
    name: str,
    *,
    lock: Node | str,
    targets: Sequence[str],
    features: Sequence[str] = (),
    default_features: bool = True,
) -> Node:
    """The crates that a build for `targets` reaches, as a directory of `<name>-<version>.crate` files.

    `lock` is a `crate_source` (its own Cargo.lock counts) or a directory beside the recipe with Cargo.toml and
    Cargo.lock. `targets` are Rust target triples, the build platform's among them for build scripts.
    """
    context = current()
    place = context.place()
    require_texts(place, name=name)
    require_lists(place, targets=targets, features=features)
    ask: dict[str, object] = {
        "targets": sorted(targets),
        "features": sorted(features),
        "default_features": default_features,
    }
    if isinstance(lock, Node):
        ask["source"] = lock.target.removeprefix("source-")
        ask["sha256"] = lock.files[""].sha256.hex if lock.files else None
    else:
        folder = context.folder() / lock
        ask["directory"] = folder.relative_to(context.root).as_posix()
        ask["sha256"] = {
            name: hashlib.sha256(read_file(folder / name, place)).hexdigest() for name in ("Cargo.lock", "Cargo.toml")
        }
    pin: CrateSetPin | None = pinned(Want("crates", name, place, ask), context.lock.crate_sets.get(name))
    files = {f"{crate.key}.crate": crate.file for crate in pin.crates} if pin else {}
    return download(f"crates-{name}", None, files, place)


def local(*names: str, name: str | None = None) -> Node:
    """Files and directories beside the recipe, as one directory; contents and executable bits count, nothing else."""
    return files(name or f"files-{current().folder().name}", beside(*names))


def beside(*names: str) -> dict[str, Path]:
    """Files and directories beside the recipe, each file by its relative name. For `files`."""
    context = current()
    place = context.place()
    folder = context.folder()
    found: dict[str, Path] = {}
    for given in names:
        check_relative(given, place, "file name")
        found.update((path.relative_to(folder).as_posix(), path) for path in _walk(folder / given, place))
    return found


def files(name: str, tree: Mapping[str, Path]) -> Node:
    """What `local` gives, of files that may be anywhere: for `vzrepro.recipes`, whose own are not beside the recipe."""
    context = current()
    place = context.place()
    content: dict[str, Digest] = {}
    for relative, path in tree.items():
        if any("\ud800" <= letter <= "\udfff" for letter in relative):
            raise UsageError(
                f"{place}: the name {relative!a} is not UTF-8", hint="rename it: names are text in a derivation"
            )
        context.reads.add(path)
        with context.trusted():
            content[relative] = nar.nar_hash(path)[0]
    drv = Derivation(name=name, builder="local", content=content)
    return part(make_node(name, "source", drv, place, tree=tree))


def text(name: str, content: str) -> Node:
    """A file called `name` in the store with this text, for what a recipe computes."""
    context = current()
    data = content.encode()
    drv = Derivation(name=name, builder="local", content={"": nar.hash_of_file(data)})
    return part(make_node(name, "source", drv, context.place(), tree={"": data}))


def read(name: str) -> str:
    """The text of a file beside the recipe."""
    context = current()
    place = context.place()
    check_relative(name, place, "file name")
    return read_file(context.folder() / name, place).decode()


def _walk(path: Path, place: str) -> Iterable[Path]:
    context = current()
    with context.trusted():
        if path.is_symlink() or path.is_file():
            return [path]
        if not path.is_dir():
            raise UsageError(f"{place}: {path.relative_to(context.root)}: no such file or directory")
        found: list[Path] = []
        pending = [path]
        while pending:
            folder = pending.pop()
            context.reads.add(folder)
            for entry in sorted(folder.iterdir()):
                if entry.name in LOCAL_IGNORED:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    pending.append(entry)
                else:
                    found.append(entry)
        return sorted(found)
