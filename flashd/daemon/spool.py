"""The spool: jobs in an SQLite file, so that what was accepted outlives a power cut.

Write-ahead log with full syncs: a job is on the card before `add` returns. Three small commits a job (accepted,
begun, ended) are all that is written, and one more each time the board makes calls for it. What an answer says while
it grows stays in RAM.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec

from flashd.daemon.job import Head, Job, Request, Result, State
from flashd.errors import GROUP_ONLY, NOT_JSON, CannotWrite, DataError, InputMissing, SpoolTaken
from flashd.system.plain_file import open_plain

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    state TEXT NOT NULL,
    source TEXT NOT NULL,
    created REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    ended REAL,
    request BLOB NOT NULL,
    result BLOB
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state) WHERE state IN ('queued', 'running');
"""
VERSION = 1
MOST_BYTES = 64 << 20
"""Of requests and results together; what ended longest ago goes first."""

FORGET = """
DELETE FROM jobs WHERE ended IS NOT NULL AND (id <= ? OR id IN (
    SELECT id FROM (
        SELECT id, SUM(LENGTH(request) + COALESCE(LENGTH(result), 0)) OVER (ORDER BY id DESC) AS bytes FROM jobs
    ) WHERE bytes > ?
))
"""
CHARGE = """
UPDATE jobs SET suspect = 1, deaths = deaths + ((SELECT COUNT(*) FROM jobs WHERE state = 'running') = 1)
WHERE state = 'running'
"""
BEGIN = """
INSERT INTO jobs (id, state, source, created, attempts, request, session) VALUES (?, ?, ?, ?, 1, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, attempts = attempts + 1
"""
END = """
INSERT INTO jobs (id, state, source, created, attempts, ended, request, result, session)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, ended = excluded.ended, result = excluded.result
"""
"""Both of a job that may have been accepted before a spool had to be put aside: the new one knows nothing of it."""

ONE, LATEST = "WHERE id = ?", "ORDER BY id DESC LIMIT ?"
OF_SESSION = "WHERE session = ? AND state IN ('done', 'cancelled') ORDER BY id DESC LIMIT 8"
BEFORE = "WHERE id < ? ORDER BY id DESC LIMIT ?"


class Spool:
    """Jobs on the card. Safe to use from several threads.

    A file that has rotted is put aside, and a new one begun: an appliance that nobody looks after goes on.

    Raises CannotWrite where the file cannot be made or written, DataError where a newer flashd wrote it.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self._lock = threading.Lock()
        self._last = 0  # the highest number of a job
        self._db: sqlite3.Connection | None = None
        with suppress(_PutAside), self._guard():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._opened()

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def add(self, request: Request) -> Job:
        """Keeps a new job; it is on the card when this returns."""
        now = time.time()
        with self._lock, self._guard():
            row = self._connection.execute(
                "INSERT INTO jobs (state, source, created, request, session) VALUES (?, ?, ?, ?, ?)",
                (State.QUEUED, request.source, now, msgspec.json.encode(request), request.session),
            )
        self._last = int(row.lastrowid or 0)
        return Job(id=self._last, request=request, created=now)

    def begin(self, job: Job) -> None:
        """Notes that a job is being answered, so that one that kills the daemon is not tried for ever."""
        with self._lock, self._guard():
            self._connection.execute(
                BEGIN,
                (
                    job.id, State.RUNNING, job.request.source, job.created, msgspec.json.encode(job.request),
                    job.request.session,
                ),
            )  # fmt: skip

    def note(self, job: Job) -> None:
        """Keeps how far a job that is being answered has come: calls that were made are not made again."""
        with self._lock, self._guard():
            self._connection.execute(
                "UPDATE jobs SET result = ? WHERE id = ?", (msgspec.json.encode(job.result), job.id)
            )

    def begin_again(self, died: bool) -> dict[int, int]:
        """A new daemon begins: what was being answered waits again. All of this is noted, or nothing.

        `died`: the last run ended by something in the process itself. What ran then is suspect until it ends, and is
        charged with the death if it ran alone.

        Returns the jobs that are suspect, and how often the daemon died while it answered each alone.
        """
        with self._lock, self._guard():
            with self._whole():
                if died:
                    self._connection.execute(CHARGE)
                self._connection.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
            rows = self._connection.execute("SELECT id, deaths FROM jobs WHERE ended IS NULL AND suspect")
            return dict(rows.fetchall())

    def put_back(self, job: Job) -> None:
        """The job was interrupted through no fault of its own and waits again."""
        with self._lock, self._guard():
            self._connection.execute("UPDATE jobs SET state = ?, attempts = 0 WHERE id = ?", (State.QUEUED, job.id))

    def end(self, job: Job) -> None:
        """Keeps a job's result, and forgets the oldest beyond `keep` and MOST_BYTES."""
        with self._lock, self._guard(), self._whole():
            self._connection.execute(
                END,
                (
                    job.id, job.state, job.request.source, job.created, job.attempts, job.ended,
                    msgspec.json.encode(job.request), msgspec.json.encode(job.result), job.request.session,
                ),
            )  # fmt: skip
            self._connection.execute(FORGET, (job.id - self._keep, MOST_BYTES))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is done within is on the card as a whole, or not at all."""
        self._connection.execute("BEGIN")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("ROLLBACK")
            raise

    def waiting(self) -> list[Job]:
        """Jobs that were accepted and not ended, in the order in which they came."""
        return self._select("WHERE state IN ('queued', 'running') ORDER BY id")

    def last_done(self) -> Job | None:
        """The latest job that was answered."""
        return next(iter(self._select("WHERE state = 'done' ORDER BY id DESC LIMIT 1")), None)

    def last_of(self, session: str) -> Job | None:
        """The latest job of a session that said or called something."""
        jobs = self._select(OF_SESSION, session)
        return next((job for job in jobs if job.result.text or job.result.calls or job.result.steps), None)

    def get(self, number: int) -> Job | None:
        return next(iter(self._select(ONE, number)), None)

    def recent(self, most: int) -> list[Job]:
        """The latest jobs, newest first."""
        return self._select(LATEST, most)

    def heads(self, most: int, before: int) -> list[Head]:
        """What the latest jobs before a number begin with, newest first; one job at a time is in RAM."""
        with self._lock, self._guard():
            return [Head.of(job) for job in _each_job(self._connection, BEFORE, before, most)]

    def _select(self, where: str, *values: int | str) -> list[Job]:
        with self._lock, self._guard():
            return _jobs(self._connection, where, *values)

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _opened(self) -> sqlite3.Connection:
        fd = open_plain(self.path, os.O_RDWR | os.O_CREAT)
        try:
            with suppress(PermissionError):  # another user's
                os.fchmod(fd, 0o660)  # prompts are not for everybody; SQLite gives its other files the same mode
        finally:
            os.close(fd)
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(SCHEMA)
            columns = [column[1] for column in db.execute("PRAGMA table_info(jobs)")]
            if "deaths" not in columns:
                db.execute("ALTER TABLE jobs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0")
            if "suspect" not in columns:
                db.execute("ALTER TABLE jobs ADD COLUMN suspect INTEGER NOT NULL DEFAULT 0")
                db.execute("UPDATE jobs SET suspect = 1 WHERE ended IS NULL AND deaths > 0")
            if "session" not in columns:
                db.execute("ALTER TABLE jobs ADD COLUMN session TEXT")
            db.execute("CREATE INDEX IF NOT EXISTS sessions ON jobs (session) WHERE session IS NOT NULL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise DataError(
                    f"{self.path}: a spool of version {version}, this flashd writes {VERSION}; update flashd"
                )
            if version == 0:
                db.execute(f"PRAGMA user_version = {VERSION}")
                # no two jobs have one number, those included that wait in RAM
                db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', ?)", (self._last,))
            (self._last,) = db.execute("SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:
                self._begin_anew(error)
            raise CannotWrite(f"{self.path}: {error}") from error
        except OSError as error:
            raise CannotWrite(f"{self.path}: {error.strerror}") from error

    def _begin_anew(self, error: sqlite3.DatabaseError) -> None:
        """Opens the file once more, for a read may have gone wrong, or a new one. Raises _PutAside for that."""
        self.close()
        if _sound(self.path):
            self._db = self._opened()
            return
        aside = f"{self.path.name}.damaged"
        for file in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + file).replace(self.path.with_name(aside + file))
        self._db = self._opened()
        log.error("%s: %s; it is kept as %s, and a new one is begun", self.path, error, aside)
        raise _PutAside(f"{self.path}: {error}; a new one is begun, try again") from error


@contextmanager
def held_alone(path: Path) -> Iterator[None]:
    """Keeps other daemons from a spool: two would answer each job twice. Raises SpoolTaken, CannotWrite."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_plain(lock, os.O_RDWR | os.O_CREAT), "ab")
    except OSError as error:
        raise CannotWrite(f"{lock}: {error.strerror}") from error
    with file:
        try:
            # not flock: a child that outlives the daemon would go on holding that
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpoolTaken(f"{path}: another flashd serves from this spool; stop it first") from error
        yield


class _PutAside(CannotWrite):
    """What was there had rotted."""


def _sound(path: Path) -> bool:
    try:
        with closing(sqlite3.connect(path)) as db:
            return bool(db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def read_latest(path: Path, most: int) -> list[Job]:
    """The latest jobs, newest first, of a spool that a daemon may be writing. Raises InputMissing, DataError."""
    return _read(path, LATEST, most)


def read_one(path: Path, number: int) -> Job | None:
    """A job of a spool that a daemon may be writing. Raises InputMissing, DataError."""
    return next(iter(_read(path, ONE, number)), None)


def _read(path: Path, where: str, *values: int) -> list[Job]:
    try:
        os.close(open_plain(path))  # SQLite would not say why not
        # where nobody writes, and the folder is not ours, SQLite must not want to share the file
        alone = not path.with_name(f"{path.name}-wal").exists()
        with closing(sqlite3.connect(f"file:{path}?mode=ro{'&immutable=1' * alone}", uri=True)) as db:
            return _jobs(db, where, *values)
    except FileNotFoundError as error:
        raise InputMissing(f"{path}: no spool; has flashd serve run here?") from error
    except PermissionError as error:
        raise InputMissing(f"{path}: {GROUP_ONLY}") from error
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path}: {error}") from error


def _jobs(db: sqlite3.Connection, where: str, *values: int | str) -> list[Job]:
    return list(_each_job(db, where, *values))


def _each_job(db: sqlite3.Connection, where: str, *values: int | str) -> Iterator[Job]:
    if any(isinstance(value, int) and value >= 1 << 63 for value in values):
        return  # SQLite has no such number, so no job has it
    rows = db.execute(f"SELECT id, state, created, attempts, ended, request, result FROM jobs {where}", values)
    for number, state, created, attempts, ended, request, result in rows:
        try:
            job = Job(
                id=number, state=State(state), created=created, attempts=attempts, ended=ended,
                request=msgspec.json.decode(request, type=Request),
                result=msgspec.json.decode(result, type=Result) if result else Result(),
            )  # fmt: skip
        except (ValueError, *NOT_JSON) as error:
            log.error("job %d is damaged and left out: %s", number, error)
        else:
            yield job
