-- The store's database, version 2 (PRAGMA user_version). Times are seconds since 1970, sizes bytes, hashes lower-case
-- hex, paths `<hash>-<name>`. docs/store.md says what each table is for. Every statement may run twice.

CREATE TABLE IF NOT EXISTS objects (
    id         INTEGER PRIMARY KEY,
    path       TEXT    NOT NULL UNIQUE,
    nar_hash   TEXT    NOT NULL,
    nar_size   INTEGER NOT NULL,
    drv_hash   TEXT,
    build_key  TEXT,
    outcome    TEXT    NOT NULL,
    registered INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS objects_by_build_key ON objects (build_key) WHERE build_key IS NOT NULL;

-- A reference may name an object that is not here (any more), so it is a path and no key.
CREATE TABLE IF NOT EXISTS object_references (
    referrer  INTEGER NOT NULL REFERENCES objects ON DELETE CASCADE,
    reference TEXT    NOT NULL,
    PRIMARY KEY (referrer, reference)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS references_by_reference ON object_references (reference);

-- Where a download was verified from (model.origin_digest); the newest is the object's.
CREATE TABLE IF NOT EXISTS origins (
    id     INTEGER PRIMARY KEY,
    object INTEGER NOT NULL REFERENCES objects ON DELETE CASCADE,
    origin TEXT    NOT NULL,
    UNIQUE (object, origin)
);

-- For what came from elsewhere: the signed narinfo it was taken on, so that a key that is revoked loses it too.
CREATE TABLE IF NOT EXISTS vouchers (
    object  INTEGER PRIMARY KEY REFERENCES objects ON DELETE CASCADE,
    narinfo BLOB    NOT NULL
);

CREATE TABLE IF NOT EXISTS derivations (
    drv_hash  TEXT    PRIMARY KEY,
    name      TEXT    NOT NULL,
    canonical BLOB    NOT NULL,
    last_seen INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS derivations_by_name ON derivations (name, last_seen);

CREATE TABLE IF NOT EXISTS history (
    id       INTEGER PRIMARY KEY,
    name     TEXT    NOT NULL,
    action   TEXT    NOT NULL,
    secs     REAL    NOT NULL,
    nar_size INTEGER,
    ended    INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS history_by_name ON history (name, action, id);

-- Paths a running process needs, existing or not; `owner` is the file in lock/ that the process keeps locked.
CREATE TABLE IF NOT EXISTS temp_roots (
    owner TEXT    NOT NULL,
    pid   INTEGER NOT NULL,
    path  TEXT    NOT NULL,
    PRIMARY KEY (owner, path)
) WITHOUT ROWID;

PRAGMA user_version = 2;
