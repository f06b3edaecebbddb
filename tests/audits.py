"""Audit reports for tests of what shows them: the project's own graph with every kind of finding, and variations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from vzrepro.proof.audit.model import (
    REPEAT,
    Against,
    AuditedNode,
    AuditReport,
    AxisInfo,
    Cause,
    Cell,
    Detail,
    Explanation,
    Guess,
    PastAudit,
    Rebuild,
    Verdict,
)
from vzrepro.proof.sbom.seed import Seed, SeedImage
from vzrepro.recipe import lock
from vzrepro.recipe.evaluate import evaluate

PROJECT = Path(__file__).resolve().parents[1]

AXES = tuple(
    AxisInfo(name, about, applied, proof)
    for name, about, applied, proof in (
        ("build-path", "the directory the build runs in", "a second mount of /build", "the working directory"),
        ("host-name", "host and domain name", "--hostname and --domainname", "uname -n"),
        ("user", "user and group id", "--user 54321:54321", "id -u, id -g"),
        ("umask", "the umask", "set by the starter", "umask"),
        ("time-zone", "TZ", "the variable TZ", "date +%Z"),
        ("locale", "LC_ALL", "the variable LC_ALL", "the variable LC_ALL"),
        ("home", "HOME", "the variable HOME", "the variable HOME"),
        ("path", "PATH", "a directory more in PATH", "the variable PATH"),
        ("environment", "variables that no recipe knows", "20 variables more", "the number of variables"),
        ("cores", "CPUs and jobs at once", "VZ_CORES and a CPU set", "CPUs by affinity"),
        ("memory", "the memory limit", "--memory", "the cgroup's limit"),
        ("file-system", "the file system below /build", "/build on a fresh tmpfs", "statfs of /build"),
        ("directory-order", "the order that directories list files in", "inputs staged in another order", "readdir"),
        ("kernel-version", "what uname says", "personality UNAME26", "uname -r"),
        ("address-layout", "address space randomization", "personality ADDR_NO_RANDOMIZE", "the personality"),
        ("clock", "the time of day", "shifted by 400 days", "date +%s of a dynamic program"),
        ("shell", "what /bin/sh is", "bash mounted as /bin/sh", "sha256 of /bin/sh"),
        ("input-topology", "hard links or copies", "inputs copied", "link counts below /in"),
        ("process-ids", "process ids", "5,000 ids used up before", "the starter's own id"),
        ("runtime", "the OCI runtime", "--runtime crun", "the runtime's name"),
        ("randomness", "random numbers (held only)", "getrandom gives a constant", "8 bytes of getrandom"),
    )
)

_OBSERVED = {
    "build-path": ("/build", "/b/4c1f/elsewhere"),
    "host-name": ("localhost", "audit-7.example.org"),
    "user": ("1000:1000", "54321:54321"),
    "umask": ("0022", "0077"),
    "time-zone": ("UTC", "Pacific/Kiritimati"),
    "locale": ("C.UTF-8", "C"),
    "home": ("/build", "/nonexistent"),
    "path": ("/usr/bin:/bin", "/usr/bin:/bin:/audit/nowhere"),
    "environment": ("9 variables", "29 variables"),
    "cores": ("2 jobs on 2 CPUs", "3 jobs on 1 CPU"),
    "memory": ("4,000 MB", "3,000 MB"),
    "file-system": ("ext2/ext3/ext4", "tmpfs"),
    "directory-order": ("a b c d e f g h", "f c h a g b e d"),
    "kernel-version": ("6.12.63", "2.6.72"),
    "address-layout": ("randomized", "fixed"),
    "clock": ("2026-11-24", "2027-12-29"),
    "shell": ("dash", "bash"),
    "input-topology": ("2 links", "1 link"),
    "process-ids": ("7", "5008"),
    "runtime": ("runc", "crun"),
    "randomness": ("8f41c07be2a95d13", "0000000000000000"),
}

_SECONDS = {"kernel-container": 512, "kernel-container-config": 14, "busybox": 41, "youki": 96, "guest-agent": 78}

PATH_IN_ELF = Explanation(
    id="e-path",
    tool="diffoscope 295",
    details=(
        Detail(
            file="bin/vz-agent",
            member=(".rodata",),
            kind="ELF section",
            offset=0x3A41C,
            count=1284,
            excerpt="""--- registered/bin/vz-agent .rodata
+++ rebuilt/bin/vz-agent .rodata
@@ -4118,6 +4118,6 @@
   0x0003a3fc 6d657373 61676520 746f6f20 6c6f6e67 message too long
-  0x0003a41c 2f627569 6c642f73 72632f73 65727665 /build/src/serve
-  0x0003a42c 722e7273 00000000 00000000 00000000 r.rs............
+  0x0003a41c 2f622f34 6331662f 656c7365 77686572 /b/4c1f/elsewher
+  0x0003a42c 652f7372 632f7365 72766572 2e727300 e/src/server.rs.
   0x0003a44c 63616c6c 65642060 4f707469 6f6e3a3a called `Option::
""",
        ),
        Detail(
            file="bin/vz-agent",
            member=(".note.gnu.build-id",),
            kind="ELF section",
            offset=0x2E0,
            count=20,
            excerpt="""@@ -1,2 +1,2 @@
-  0x000002e0 9d1c44e07a5b3f28 c1e6a00f52d7b934
+  0x000002e0 4af0b2c6911e07d5 6b83fd20ae57c41e
""",
        ),
    ),
    guesses=(
        Guess(
            "path",
            "/b/4c1f/elsewhere occurs 31 times in the rebuilt file and never in the registered one",
            "pass --remap-path-prefix=$PWD=. to rustc",
        ),
    ),
    truncated="58 more places differ; the comparison stops at 60",
)

CPIO_TIMES = Explanation(
    id="e-clock",
    tool="diffoscope 295",
    details=(
        Detail(
            file="initramfs.cpio.zst",
            member=("initramfs.cpio", "etc/hostname"),
            kind="cpio member",
            offset=None,
            count=None,
            excerpt="""@@ -12,3 +12,3 @@
 drwxr-xr-x   0        0        0        0 2025-01-01 00:00:00 etc
--rw-r--r--   0        0        0       10 2026-11-24 00:00:00 etc/hostname
+-rw-r--r--   0        0        0       10 2027-12-29 00:00:00 etc/hostname
 -rw-r--r--   0        0        0       31 2025-01-01 00:00:00 etc/passwd
""",
        ),
    ),
    guesses=(
        Guess(
            "timestamp",
            "the build's day, 2026-11-24, became 2027-12-29 with the clock",
            "write SOURCE_DATE_EPOCH as the modification time",
        ),
    ),
)

CONFIG_LINE = Explanation(
    id="e-config",
    tool="bytes",
    details=(
        Detail(
            file=".config",
            member=("CONFIG_BUILD_SALT",),
            kind="text line",
            offset=1840,
            count=9,
            excerpt="""@@ -61,3 +61,3 @@
 # CONFIG_WERROR is not set
-CONFIG_BUILD_SALT="localhost"
+CONFIG_BUILD_SALT="audit-7.example.org"
 CONFIG_HAVE_KERNEL_GZIP=y
""",
        ),
    ),
    guesses=(Guess("host", "the host's name is in the output", 'set CONFIG_BUILD_SALT="" in the fragment'),),
)

RANDOM_BYTES = Explanation(
    id="e-random",
    tool="bytes",
    details=(Detail("vz-probe", (), "bytes", 4096, 32, ""),),
    guesses=(),
    truncated="diffoscope was stopped after 300 s",
)


def digest(*parts: str) -> str:
    """A hash that looks real, for these words."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def sample() -> AuditReport:
    """An audit of container-bundle, one axis at a time, in which every verdict and every kind of cell occurs."""
    findings: Mapping[str, Callable[[AuditedNode], AuditedNode]] = {
        "guest-agent": _guest_agent,
        "initramfs": lambda node: _blamed(node, "clock", CPIO_TIMES),
        "kernel-container-config": lambda node: _blamed(node, "host-name", CONFIG_LINE),
        "kernel-container": _kernel,
        "busybox": _busybox,
        "vz-probe": _vz_probe,
        "youki": _reused,
        "vhost-device-vsock": _together,
        "probe-disks": _stopped,
        "container-probes": _no_clock,
    }
    nodes = tuple(findings.get(node.target, lambda same: same)(node) for node in _closure())
    images = tuple(node for node in nodes if node.kind == "image")
    sizes = {"image-tools": (61, 22_408_112), "image-c": (118, 143_921_660), "image-rust": (141, 402_117_200)}
    seed_images = tuple(
        SeedImage(image.target, *sizes.get(image.target, (97, 120_450_008)))
        for image in sorted(images, key=lambda each: each.target)
    )
    disks = next(node for node in nodes if node.target == "initramfs")
    return AuditReport(
        id="20261124T181203Z-5f0c1d",
        targets=("container-bundle",),
        mode="alone",
        deep=False,
        rounds=1,
        started="2026-11-24T18:12:03Z",
        finished="2026-11-24T21:40:47Z",
        complete=True,
        builder={
            "key": "builder-1:3f9a0c77",
            "engine": "Docker 20.10.24, runc 1.1.5",
            "kernel": "Linux 6.12.63 x86_64",
            "cores": "2",
            "vzrepro": "0.1.0",
        },
        axes=AXES,
        nodes=nodes,
        seed=Seed(packages=388, bytes=712_904_118, images=seed_images),
        against=tuple(_against(nodes, disks)),
        explanations={each.id: each for each in (PATH_IN_ELF, CPIO_TIMES, CONFIG_LINE, RANDOM_BYTES)},
        history=_history(),
    )


def reproduced(report: AuditReport | None = None) -> AuditReport:
    """The same audit when all went well: what is built is REPRODUCED wherever an axis can be varied."""
    report = report or sample()
    nodes = tuple(
        _plain(replace(node, verdict=Verdict.REPRODUCED, causes=())) if node.kind == "sandbox" else node
        for node in report.nodes
    )
    agreed = tuple(replace(each, agrees=None if each.agrees is None else True) for each in report.against)
    return replace(report, nodes=nodes, against=agreed, explanations={})


HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'><svg onload=document.title='owned'>",
    "</style><style>*{display:none}</style>",
    "\x1b[2J\x1b[31mred\x07\x00nul",
    "\u202etxt.exe\u202c",
    "\udcff\ud800 lone",
    "&lt;b&gt; &amp; &#60;",
    "https://example.org/" + "x" * 3000,
)


def hostile() -> AuditReport:
    """The sample with markup, control characters and endless words wherever a text stands."""
    report = sample()
    marks = iter(HOSTILE * 400)
    words = {node.target: f"{node.target}{next(marks)}" for node in report.nodes}

    def dirty(text: str) -> str:
        return f"{text} {next(marks)}"

    def rebuild(each: Rebuild) -> Rebuild:
        return replace(
            each,
            reason=dirty(each.reason or ""),
            log=HOSTILE,
            observed={axis: (dirty(low), dirty(high)) for axis, (low, high) in each.observed.items()},
        )

    def guess(each: Guess) -> Guess:
        return Guess(dirty(each.cause), dirty(each.evidence), dirty(each.fix))

    def node(each: AuditedNode) -> AuditedNode:
        return replace(
            each,
            target=words[each.target],
            inputs={dirty(name): drv for name, drv in each.inputs.items()},
            cells={
                axis: replace(cell, reason=dirty(cell.reason or ""), held=cell.held and dirty(cell.held))
                for axis, cell in each.cells.items()
            },
            rebuilds=tuple(map(rebuild, each.rebuilds)),
            causes=tuple(replace(cause, guess=cause.guess and guess(cause.guess)) for cause in each.causes),
        )

    return replace(
        report,
        targets=(words["container-bundle"],),
        builder={name: dirty(value) for name, value in report.builder.items()},
        axes=tuple(replace(axis, about=dirty(axis.about), applied=dirty(axis.applied)) for axis in report.axes),
        nodes=tuple(map(node, report.nodes)),
        against=tuple(replace(each, cache=dirty(each.cache), signers=HOSTILE) for each in report.against),
        explanations={
            name: replace(
                each,
                details=tuple(
                    replace(detail, file=dirty(detail.file), member=HOSTILE, excerpt="\n-".join(HOSTILE))
                    for detail in each.details
                ),
                guesses=tuple(map(guess, each.guesses)),
                truncated=dirty(""),
            )
            for name, each in report.explanations.items()
        },
        history=tuple(replace(past, id=dirty(past.id), targets=HOSTILE) for past in report.history),
    )


def large(built: int = 150) -> AuditReport:
    """A report over `built` built nodes, each made from up to three earlier ones, in about a dozen steps."""
    report = sample()
    example = next(node for node in report.nodes if node.target == "vz-probe")
    nodes: list[AuditedNode] = []
    for number in range(built):
        name = f"part-{number:03d}"
        level = number * 12 // built
        earlier = [node for node in nodes if int(node.build_key or "0") < level]
        picked = [earlier[int(digest(name, str(turn)), 16) % len(earlier)] for turn in range(3)] if earlier else []
        nodes.append(
            _plain(
                replace(
                    example,
                    target=name,
                    drv_hash=digest("drv", name),
                    build_key=str(level),
                    inputs={each.target: each.drv_hash for each in picked},
                    verdict=Verdict.REPRODUCED,
                    causes=(),
                )
            )
        )
    nodes[built // 4] = _blamed(nodes[built // 4], "clock", CPIO_TIMES)
    return replace(report, targets=(nodes[-1].target,), nodes=tuple(nodes), against=(), history=())


@cache
def _closure() -> tuple[AuditedNode, ...]:
    """The real graph of container-bundle, as nodes of which those that are built came out the same everywhere."""
    graph = evaluate(PROJECT, lock.load(PROJECT / "lock.toml"), "linux/amd64")
    nodes = []
    for node in graph.closure([graph.find("container-bundle")]):
        image = {"image": node.drv.image.hex} if node.drv.image else {}
        audited = AuditedNode(
            target=node.target,
            kind=node.drv.builder,
            drv_hash=node.drv_hash.hex,
            path=str(node.path),
            build_key=digest("key", node.target) if node.drv.builder == "sandbox" else None,
            nar_hash=digest("nar", node.drv_hash.hex),
            nar_size=1_000 + int(digest(node.target)[:6], 16),
            inputs={**image, **{name: drv.hex for name, drv in node.drv.inputs.items()}},
            verdict=Verdict.REPRODUCED if node.drv.builder == "sandbox" else Verdict.UNTESTED,
        )
        nodes.append(_plain(audited) if audited.kind == "sandbox" else _given(audited))
    return tuple(nodes)


def _given(node: AuditedNode) -> AuditedNode:
    reason = "taken as it is; --deep writes it again" if node.kind != "local" else "a file of this workspace"
    return replace(node, cells={REPEAT: Cell(Verdict.UNTESTED, reason=reason)})


def _plain(node: AuditedNode) -> AuditedNode:
    cells = {REPEAT: _cell(node, REPEAT, Verdict.REPRODUCED)}
    cells |= {axis.name: _cell(node, axis.name, Verdict.REPRODUCED) for axis in AXES}
    cells["runtime"] = Cell(Verdict.INCONCLUSIVE, reason="not available here: Docker knows no second runtime")
    cells["randomness"] = Cell(Verdict.UNTESTED, reason="only held constant, when a node differs by itself")
    rebuilt = [name for name in (REPEAT, *(axis.name for axis in AXES)) if cells[name].rebuilds]
    return replace(node, cells=cells, rebuilds=tuple(_rebuild(node, name) for name in rebuilt))


def _cell(node: AuditedNode, axis: str, verdict: Verdict, reason: str | None = None) -> Cell:
    return Cell(verdict, reason=reason, rebuilds=(f"{node.target}-{axis}",), milliseconds=_milliseconds(node, axis))


def _milliseconds(node: AuditedNode, axis: str) -> int:
    return _SECONDS.get(node.target, 6) * 1000 + int(digest(node.target, axis)[:3], 16)


def _rebuild(
    node: AuditedNode, axis: str, verdict: Verdict = Verdict.REPRODUCED, explanation: str | None = None
) -> Rebuild:
    same = verdict is Verdict.REPRODUCED
    return Rebuild(
        id=f"{node.target}-{axis}",
        axes=() if axis == REPEAT else (axis,),
        held=(),
        round=0,
        verdict=verdict,
        nar_hash=node.nar_hash if same else None if verdict is Verdict.BUILD_FAILED else digest("other", node.target),
        nar_size=node.nar_size if verdict is not Verdict.BUILD_FAILED else None,
        started="2026-11-24T18:30:00Z",
        milliseconds=_milliseconds(node, axis),
        observed={} if axis == REPEAT else {axis: _OBSERVED[axis]},
        log=(f"building {node.target}", "   Compiling libc v0.2.180", "    Finished `release` profile in 1m 12s"),
        statement=digest("statement", node.target, axis),
        explanation=explanation,
    )


def _blamed(node: AuditedNode, axis: str, explanation: Explanation) -> AuditedNode:
    return _differing(node, {axis: explanation})


def _differing(node: AuditedNode, found: Mapping[str, Explanation]) -> AuditedNode:
    cells = {**node.cells, **{axis: _cell(node, axis, Verdict.DIFFERS, "other bytes came out") for axis in found}}
    rebuilds = tuple(
        _rebuild(node, name, Verdict.DIFFERS, found[name].id)
        if (name := (each.axes or (REPEAT,))[0]) in found
        else each
        for each in node.rebuilds
    )
    causes = tuple(
        Cause(axis, explanation.guesses[0] if explanation.guesses else None, explanation.id)
        for axis, explanation in found.items()
    )
    return replace(node, verdict=Verdict.DIFFERS, cells=cells, rebuilds=rebuilds, causes=causes)


def _guest_agent(node: AuditedNode) -> AuditedNode:
    node = _differing(node, {"build-path": PATH_IN_ELF, "cores": PATH_IN_ELF})
    order = Guess("parallelism", "functions of 16 units are in another order", "build with codegen-units = 1")
    return replace(node, causes=(node.causes[0], Cause("cores", order, PATH_IN_ELF.id)))


def _kernel(node: AuditedNode) -> AuditedNode:
    held = Cell(Verdict.UNTESTED, held="the kernel's modules.order follows readdir; the recipe sorts its inputs")
    return replace(node, cells={**node.cells, "directory-order": held})


def _busybox(node: AuditedNode) -> AuditedNode:
    failed = replace(
        _rebuild(node, "memory", Verdict.BUILD_FAILED),
        reason="exit 137: the container ran out of memory (3,000 MB)",
        log=("  CC      networking/tls.o", "  LD      busybox_unstripped", "Killed"),
    )
    return replace(
        node,
        verdict=Verdict.BUILD_FAILED,
        cells={**node.cells, "memory": _cell(node, "memory", Verdict.BUILD_FAILED, failed.reason)},
        rebuilds=tuple(failed if each.axes == ("memory",) else each for each in node.rebuilds),
    )


def _vz_probe(node: AuditedNode) -> AuditedNode:
    """Differs with nothing varied, because of random numbers."""
    node = _differing(node, {REPEAT: RANDOM_BYTES})
    unknown = Cell(Verdict.INCONCLUSIVE, reason="differs with nothing varied")
    pair = tuple(
        replace(
            _rebuild(node, "randomness"),
            id=f"{node.target}-held-{turn}",
            axes=(),
            held=("randomness",),
            nar_hash=digest("held", node.target),
        )
        for turn in (1, 2)
    )
    cells = {name: unknown if name != REPEAT else cell for name, cell in node.cells.items()}
    cells["randomness"] = Cell(
        Verdict.DIFFERS,
        reason="two rebuilds with it held constant are equal",
        rebuilds=tuple(each.id for each in pair),
        milliseconds=sum(each.milliseconds for each in pair),
    )
    guess = Guess("random", "32 bytes at 4096 have 5.0 bits of entropy each", "seed the generator from the sources")
    repeats = tuple(each for each in node.rebuilds if not each.axes)
    return replace(node, cells=cells, rebuilds=(*repeats, *pair), causes=(Cause("randomness", guess, RANDOM_BYTES.id),))


def _reused(node: AuditedNode) -> AuditedNode:
    cells = {name: replace(cell, reused=bool(cell.rebuilds)) for name, cell in node.cells.items()}
    return replace(node, cells=cells)


def _together(node: AuditedNode) -> AuditedNode:
    """All axes in one rebuild."""
    varied = tuple(name for name, cell in node.cells.items() if cell.rebuilds and name != REPEAT)
    one = replace(
        _rebuild(node, varied[0]),
        id=f"{node.target}-together",
        axes=varied,
        observed={axis: _OBSERVED[axis] for axis in varied},
    )
    cells = {
        name: replace(cell, together=len(varied), rebuilds=(one.id,)) if name in varied else cell
        for name, cell in node.cells.items()
    }
    return replace(node, cells=cells, rebuilds=(node.rebuilds[0], one))


def _stopped(node: AuditedNode) -> AuditedNode:
    cell = Cell(Verdict.UNTESTED, reason="the audit was stopped before")
    return replace(node, verdict=Verdict.UNTESTED, cells=dict.fromkeys(node.cells, cell), rebuilds=())


def _no_clock(node: AuditedNode) -> AuditedNode:
    cell = Cell(Verdict.INCONCLUSIVE, reason="did not take effect: date still says 2026-11-24")
    return replace(node, verdict=Verdict.INCONCLUSIVE, cells={**node.cells, "clock": cell})


def _against(nodes: Sequence[AuditedNode], liar: AuditedNode) -> list[Against]:
    rows = []
    for node in nodes:
        if node.kind != "sandbox":
            continue
        rows.append(Against("s3://releases/vzrepro", node.target, node.nar_hash, ("release:9c1e",), True))
        if node.target == "kernel-container":
            rows.append(Against("https://mirror.example/vz", node.target, None, (), None))
        else:
            same = node.drv_hash != liar.drv_hash
            found = node.nar_hash if same else digest("lie")
            rows.append(Against("https://mirror.example/vz", node.target, found, ("mirror:0b77", "ci:41d0"), same))
    return rows


def _history() -> tuple[PastAudit, ...]:
    rows = (
        ("20261124T181203Z-5f0c1d", "2026-11-24T21:40:47Z", "alone", 8, 4, 1, 1, 1),
        ("20261121T090000Z-77ab02", "2026-11-21T09:14:10Z", "together", 13, 2, 0, 0, 0),
        ("20261112T090000Z-c0ffee", "2026-11-12T09:12:55Z", "together", 12, 2, 0, 1, 0),
        ("20261102T090000Z-1d2e3f", "2026-11-02T13:37:00Z", "alone", 10, 3, 0, 2, 0),
    )
    return tuple(
        PastAudit(
            id=id_,
            finished=finished,
            targets=("container-bundle",),
            mode=mode,
            verdict=Verdict.DIFFERS,
            nodes={
                name: count
                for name, count in zip(
                    ("REPRODUCED", "DIFFERS", "BUILD_FAILED", "INCONCLUSIVE", "UNTESTED"), counts, strict=True
                )
                if count
            },
        )
        for id_, finished, mode, *counts in rows
    )
