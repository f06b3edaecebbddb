"""A bucket whose server lies: in listings, between two answers, with other tenants' keys, old narinfos and worse.

Each round the server tells one to three lies while one command reads from it or collects in it. The command must end in
time and in little memory, well or with an error that says why; nothing wrong may get into the store, and nothing but
entries of the cache's own may be deleted. A fault is a command that failed. See `frame` for the options.
"""

from __future__ import annotations

import json
import random
import re
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.campaigns.frame import Line, Round, Wrong, main
from tests.campaigns.full_disks import FAILED, explained
from tests.campaigns.kills import learn
from tests.campaigns.mill import Mill
from tests.contract.memory import MemoryBackend
from tests.contract.test_hostile import ON_THE_WAY, zstd
from tests.faults import Answer, Exchange, Fault, FaultyProxy
from vzrepro.cache import NarInfo, SigningKey
from vzrepro.cache import check as checking
from vzrepro.cache.backend import is_key
from vzrepro.cache.collect import collect
from vzrepro.cache.history import CacheHistory
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.places import open_backend
from vzrepro.cache.remote import Patience
from vzrepro.recipe import plan

PREFIX = "team/cache/"
PATIENCE_SECS = 2.0
LONGEST_SECS = 90.0
MEMORY = 160 << 20
"""Bytes that a command may take besides what this process has; the lying server is in the same process."""
_DAY = 86400.0

KEYS = [
    *("../../etc/passwd", "/etc/passwd", "..", ".", "", "team/cache/../other/x.narinfo", "team/cache//x.narinfo"),
    *("team/other/secret", "other/x.narinfo", "team/cache/.hidden", "team/cache/nar/\x1b[2J", "team/cache/a\0b"),
    *("team/cache/roots/../../x.json", "team/cache/roots/evil.json", "team/cache/gc/evil.json"),
    "team/cache/" + "a" * 2000,
    *("team/cache/nar/é.nar.zst", "team/cache/0.narinfo", f"team/cache/{'0' * 32}.narinfo"),
]


class LyingBucket:
    """The server: `entries` are what is below the prefix, `deleted` all keys that were asked to go."""

    def __init__(self, entries: dict[str, bytes], chance: random.Random, wanted: str) -> None:
        self.entries = entries
        self.chance = chance
        self.wanted = wanted
        self.deleted: list[str] = []
        self.asked: Counter[str] = Counter()
        self.lies = chance.sample(list(LIES), chance.randint(1, 3))
        self.listing: list[Callable[[str], str]] = []
        self.content: list[Callable[[str, bytes], bytes]] = []
        self.answers: list[Callable[[Exchange, Answer], Answer]] = []
        self.extra: list[str] = []
        self.endless = ""
        self.faults: dict[str, Fault] = {}
        for name in self.lies:
            LIES[name](self)

    def serve(self, exchange: Exchange) -> None:
        """Answer one request."""
        parts = urlsplit(exchange.path)
        key, query = unquote(parts.path).removeprefix("/bucket").removeprefix("/"), parse_qs(parts.query)
        self.asked[f"{exchange.method} {key}"] += 1
        for pattern, fault in self.faults.items():
            if re.search(pattern, exchange.path):
                fault(Relayed(exchange, self))
                return
        exchange.give(self.answer(exchange, key, query))
        exchange.keep = exchange.keep and exchange.method in ("GET", "HEAD")

    def answer(self, exchange: Exchange, key: str, query: dict[str, list[str]]) -> Answer:
        """What is said, lies and all."""
        if exchange.method == "DELETE":
            self.deleted.append(key)
            return Answer(204, {}, b"")
        if exchange.method not in ("GET", "HEAD"):
            return Answer(501, {"content-length": "0"}, b"")
        if not key:
            return _xml(self._listing(query))
        data = self.entries.get(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if data is None:
            return Answer(404, {"content-length": "0"}, b"")
        for change in self.content:
            data = change(key, data)
        told = _ranged(exchange, data)
        for turn in self.answers:
            told = turn(exchange, told)
        return told

    def _listing(self, query: dict[str, list[str]]) -> str:
        start = query.get("prefix", [""])[0]
        keys = [*(PREFIX + each for each in sorted(self.entries)), *self.extra]
        shown = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(self.entries.get(key.removeprefix(PREFIX), b''))}</Size>"
            f"<LastModified>{self._age(key)}</LastModified></Contents>"
            for key in keys
            if key.startswith(start) or key in self.extra
        )
        more = "<IsTruncated>false</IsTruncated>"
        if self.endless:
            token = f"<NextContinuationToken>{self.asked['GET ']}</NextContinuationToken>"
            more = f"<IsTruncated>true</IsTruncated>{token}"
            shown = shown if self.endless == "again" else ""
        document = f"<ListBucketResult><EncodingType>url</EncodingType>{more}{shown}</ListBucketResult>"
        for change in self.listing:
            document = change(document)
        return document

    def _age(self, key: str) -> str:
        return "2020-01-01T00:00:00Z"

    def swap(self, key: str, other: bytes, *, after: int) -> None:
        """From the n-th time on, something else is under this key."""
        seen = Counter[str]()

        def change(asked: str, data: bytes) -> bytes:
            seen[asked] += 1
            return other if asked == PREFIX + key and seen[asked] > after else data

        self.content.append(change)


class Relayed:
    """An exchange whose server behind is the bucket, for faults of `tests.faults`."""

    def __init__(self, exchange: Exchange, bucket: LyingBucket) -> None:
        self._exchange, self._bucket = exchange, bucket

    def __getattr__(self, name: str) -> object:
        return getattr(self._exchange, name)

    def ask(self, path: str | None = None, *, drop: object = ()) -> Answer:
        parts = urlsplit(path or self._exchange.path)
        key = unquote(parts.path).removeprefix("/bucket").removeprefix("/")
        return self._bucket.answer(self._exchange, key, parse_qs(parts.query))


def _xml(document: str) -> Answer:
    data = document.encode()
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    return Answer(200, {"content-length": str(len(data)), "content-type": "application/xml", "date": date}, data)


def _ranged(exchange: Exchange, data: bytes) -> Answer:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    head = {"date": date, "last-modified": "Wed, 01 Jan 2020 00:00:00 GMT", "etag": f'"{hash(data):x}"'}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", exchange.headers.get("range", ""))
    if match is None:
        return Answer(200, {**head, "content-length": str(len(data))}, data)
    first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        return Answer(416, {**head, "content-length": "0"}, b"")
    body = data[first : last + 1]
    span = f"bytes {first}-{last}/{len(data)}"
    return Answer(206, {**head, "content-length": str(len(body)), "content-range": span}, body)


# --- lies -------------------------------------------------------------------------------------------------------------


def _foreign_keys(bucket: LyingBucket) -> None:
    bucket.extra += bucket.chance.sample(KEYS, 6)


def _endless(bucket: LyingBucket) -> None:
    bucket.endless = bucket.chance.choice(("empty", "again"))


def _odd_listing(bucket: LyingBucket) -> None:
    old, new = bucket.chance.choice(
        [
            ("<Size>", "<Size>-"),
            ("<Size>", "<Size>" + "9" * 30),
            ("2020-01-01T00:00:00Z", "9999-99-99"),
            ("2020-01-01T00:00:00Z", "9999-12-31T23:59:59Z"),
            ("<Key>", "<Key><Key>"),
            ("<Key>", "<Kex>"),
            ("<ListBucketResult>", "<!DOCTYPE l [<!ENTITY a 'aaaa'>]><ListBucketResult>"),
            ("</ListBucketResult>", ""),
            ("<IsTruncated>false", "<IsTruncated>true"),
        ]
    )
    bucket.listing.append(lambda document: document.replace(old, new))


def _many_entries(bucket: LyingBucket) -> None:
    bucket.extra += [f"{PREFIX}{number:032d}.narinfo" for number in range(5000)]


def _other_after_looking(bucket: LyingBucket) -> None:
    """The narinfo, or the NAR, is another's once it has been looked at."""
    keys = [key for key in bucket.entries if key.endswith(".narinfo") or key.startswith("nar/")]
    one, other = bucket.chance.sample(keys, 2)
    bucket.swap(one, bucket.entries[other], after=bucket.chance.randrange(2))


def _old_narinfo(bucket: LyingBucket) -> None:
    """Rightly signed, of a NAR that is not there any more."""
    info = NarInfo.parse(bucket.entries[bucket.wanted])
    bucket.swap(bucket.wanted, info.render().replace(b"URL: nar/", b"URL: nar/0"), after=bucket.chance.randrange(2))


def _strangers(bucket: LyingBucket) -> None:
    """Everything is signed, by somebody else."""
    stranger = SigningKey.generate("mill-1")
    for key, data in list(bucket.entries.items()):
        if key.endswith(".narinfo"):
            bare = NarInfo.parse(data)
            bucket.entries[key] = replace(bare, signatures=(), own_signatures=()).signed(stranger).render()


def _bad_bytes(bucket: LyingBucket) -> None:
    key = bucket.chance.choice(list(bucket.entries))
    data = bytearray(bucket.entries[key])
    for _ in range(bucket.chance.randint(1, 8)):
        if data:
            data[bucket.chance.randrange(len(data))] ^= 1 << bucket.chance.randrange(8)
    bucket.swap(key, bytes(data), after=0)


def _bomb(bucket: LyingBucket) -> None:
    key = bucket.chance.choice([key for key in bucket.entries if key.startswith("nar/")])
    bucket.swap(key, zstd(bytes(64 << 20)), after=0)


def _json_bomb(bucket: LyingBucket) -> None:
    for key in list(bucket.entries):
        if key.endswith(".json") and bucket.chance.random() < 0.5:
            bucket.entries[key] = bucket.chance.choice([b"[" * 100_000, b"{}", b"\x1b[2J", b"9" * 5000, b"null"])


def _evil_root(bucket: LyingBucket) -> None:
    paths = bucket.chance.choice([["/nix/store/../../x"], [1], "x", ["/nix/store/" + "0" * 32 + "-a"]])
    root = {"format": 1, "type": "root", "name": "evil", "made": 1, "paths": paths}
    bucket.entries["roots/evil.json"] = json.dumps(root).encode()


def _sizes(bucket: LyingBucket) -> None:
    """What is announced is not what comes."""
    size = bucket.chance.choice(("0", "1", "-1", str(1 << 62), "x"))

    def turn(exchange: Exchange, told: Answer) -> Answer:
        return told.but(content_length=size) if exchange.method == "HEAD" else told

    bucket.answers.append(turn)


def _dates(bucket: LyingBucket) -> None:
    date = bucket.chance.choice(("Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "never", ""))
    bucket.answers.append(lambda _exchange, told: told.but(last_modified=date, date=date))


def _on_the_way(bucket: LyingBucket) -> None:
    _, _, *faults = bucket.chance.choice(ON_THE_WAY)
    turns = iter(faults)
    last = faults[-1]
    pattern = bucket.chance.choice((r"\.narinfo$", r"/nar/", r"list-type", r"nix-cache-info", r"\.json$"))

    def fault(exchange: Exchange) -> None:
        next(turns, last)(exchange)

    bucket.faults[pattern] = fault


LIES: dict[str, Callable[[LyingBucket], None]] = {
    "foreign keys": _foreign_keys,
    "endless pages": _endless,
    "odd listing": _odd_listing,
    "many entries": _many_entries,
    "another after looking": _other_after_looking,
    "an old narinfo": _old_narinfo,
    "strangers": _strangers,
    "bad bytes": _bad_bytes,
    "a bomb": _bomb,
    "JSON": _json_bomb,
    "an evil root": _evil_root,
    "sizes": _sizes,
    "dates": _dates,
    "on the way": _on_the_way,
}


# --- commands ---------------------------------------------------------------------------------------------------------


def _look(mill: Mill) -> None:
    for _ in mill.reader().objects():
        pass


def _verify(mill: Mill) -> None:
    checking.verify(mill.reader(), deep=True, found=lambda found: print(found.kind, found.key))


def _why_missing(mill: Mill) -> None:
    history = CacheHistory(mill.reader().access)
    plan.why(mill.graph, mill.graph.find("left"), history, plan.nearest)


def _collect(mill: Mill) -> None:
    collect(mill.reader().access.backend, older_than_secs=2 * _DAY)


VERBS: dict[str, Callable[[Mill], None]] = {
    "pull": Mill.pull,
    "ls": _look,
    "verify": _verify,
    "why-missing": _why_missing,
    "gc": _collect,
}


def hostile(name: str) -> Line:
    """Rounds of one command."""

    def line(round: Round) -> None:
        learn(round)

        def work() -> None:
            memory = MemoryBackend()
            there = Mill(round.place / "theirs", Path(), round.place / "sources", lambda: memory)
            there.realize(giving=False)
            there.push()
            there.keep_in_cache()
            bucket = LyingBucket(dict(memory.entries), round.chance, narinfo_key(there.path("whole")))
            print("lies:", bucket.lies)
            with FaultyProxy() as proxy:
                proxy.on("*", bucket.serve)
                url = f"s3://bucket/{PREFIX}?endpoint={proxy.url}&region=x"
                mill = Mill(
                    round.place / "store",
                    Path(),
                    round.place / "sources",
                    lambda: open_backend(url, Patience(PATIENCE_SECS), Path()),
                )
                begun = time.monotonic()

                def judged() -> None:
                    try:
                        VERBS[name](mill)
                    finally:
                        took = time.monotonic() - begun
                        (round.place / "took").write_text(str(took))
                        if took > LONGEST_SECS:
                            raise Wrong(f"it takes {took:.0f} s")
                        if proxy.swallowed:
                            raise Wrong("it takes in what never ends")
                        ours = [key for key in bucket.deleted if key.startswith(PREFIX) and is_key(key[len(PREFIX) :])]
                        if len(ours) < len(bucket.deleted) or any(key in KEYS for key in ours if "gc/" not in key):
                            raise Wrong(f"deleted: {[key for key in bucket.deleted if key not in ours][:5]}")

                explained(judged)()

        code = round.child(work, timed=False)
        if code not in (0, FAILED):
            raise Wrong(f"exit code {code}\n{round.said()}")
        round.tally.faults += code != 0
        round.tally.longest_secs = max(round.tally.longest_secs, float((round.place / "took").read_text()))
        round.calmly(Mill(round.place / "store", Path(), round.place / "sources").judge_store, "the store, after it")
        if (taken := round.tally.largest_bytes - (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)) > MEMORY:
            raise Wrong(f"it takes {taken >> 20} MiB")

    return line


LINES: dict[str, Line] = {f"hostile S3: {name}": hostile(name) for name in VERBS}

if __name__ == "__main__":
    import os

    from tests import servers

    os.environ.update(servers.CREDENTIALS)
    main(LINES, 40)
