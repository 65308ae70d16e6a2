# SPDX-License-Identifier: Apache-2.0
"""Where A/B tests live: one SQLite file that any number of processes of one machine share.

Requests are kept one by one up to a limit; what the results need is kept as sums, which every transaction brings
up to date together with its requests. A transaction that was committed is on the disk (write-ahead log,
`synchronous = FULL`): neither `kill -9` nor a power cut takes it back.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_k_moe.errors import ExperimentError
from adaptive_k_moe.observability.ab_test.assignment import hash64
from adaptive_k_moe.observability.ab_test.experiment import QUANTITIES, Experiment, Guardrail, Variant
from adaptive_k_moe.observability.ab_test.moments import NO_MOMENTS, Moments
from adaptive_k_moe.observability.ab_test.records import RequestRecord, ScoreRecord

Sums = dict[str, dict[str, Moments]]
"""Of each variant, by name: of each quantity, by name: what is kept of its observations."""

_APPLICATION_ID = 0x414B4142  # "AKAB"
_VERSION = 1
_BUSY_SECONDS = 5.0

_SCHEMA = """
CREATE TABLE experiments (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL,
    started_at REAL NOT NULL,
    stopped_at REAL
);
CREATE UNIQUE INDEX one_running_experiment ON experiments (stopped_at IS NULL) WHERE stopped_at IS NULL;
CREATE TABLE variants (
    id INTEGER PRIMARY KEY,
    experiment INTEGER NOT NULL REFERENCES experiments,
    name TEXT NOT NULL,
    policy TEXT NOT NULL,
    weight REAL NOT NULL,
    num_requests INTEGER NOT NULL DEFAULT 0,
    stopped_at REAL,
    stop_reason TEXT,
    stop_results TEXT,
    UNIQUE (experiment, name)
);
CREATE TABLE sums (
    variant INTEGER NOT NULL REFERENCES variants,
    metric TEXT NOT NULL,
    count INTEGER NOT NULL,
    mean REAL NOT NULL,
    squares REAL NOT NULL,
    cubes REAL NOT NULL,
    PRIMARY KEY (variant, metric)
) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    variant INTEGER NOT NULL REFERENCES variants,
    request_id TEXT NOT NULL,
    unit INTEGER NOT NULL,
    counted INTEGER NOT NULL,
    finished_at REAL NOT NULL,
    outcome TEXT NOT NULL,
    latency REAL,
    ttft REAL,
    num_prompt_tokens INTEGER,
    num_tokens INTEGER,
    avg_k REAL,
    answer_logprob REAL,
    best_logprob REAL,
    own_logprob REAL,
    agreement REAL
);
CREATE UNIQUE INDEX requests_by_id ON requests (request_id);
CREATE INDEX requests_by_unit ON requests (unit);
"""


@dataclass(frozen=True, slots=True)
class StoredExperiment:
    """An experiment with all that is known of it.

    Attributes:
        experiment: what it is.
        sums: what was observed.
        num_requests: requests of each variant, by name, those that do not count among them.
        stop_results: the results in the moment that a variant was stopped, by name.
    """

    experiment: Experiment
    sums: Sums
    num_requests: dict[str, int]
    stop_results: dict[str, dict[str, Any]]


class Store:
    """One file. Any thread may use it; one at a time does.

    Args:
        path: the file.
        create: whether to make it if there is none.

    Raises:
        ExperimentError: it is missing, cannot be opened, or is something else.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._explained("opened"):
            if not create and not self.path.exists():
                raise ExperimentError(f"there is no A/B database {self.path}: `adaptive-k ab start` makes one.")
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare_unlocked()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Experiments

    def start(self, experiment: Experiment) -> Experiment:
        """Start an experiment; as it was written, with the time.

        Raises:
            ExperimentError: another is running, or one of this name exists.
        """
        started = time.time()
        settings = {
            "guardrails": [str(guardrail) for guardrail in experiment.guardrails],
            "alpha": experiment.alpha,
            "score_share": experiment.score_share,
            "max_rows": experiment.max_rows,
        }
        with self._transaction("written") as sql:
            running = sql.execute("SELECT name FROM experiments WHERE stopped_at IS NULL").fetchone()
            if running:
                raise ExperimentError(f"the experiment {running[0]!r} is running in {self.path}: stop it first.")
            if sql.execute("SELECT 1 FROM experiments WHERE name = ?", (experiment.name,)).fetchone():
                raise ExperimentError(
                    f"{self.path} has an experiment {experiment.name!r} already: choose another name, since the "
                    "name decides which requests belong to which variant."
                )
            cursor = sql.execute(
                "INSERT INTO experiments (name, settings, started_at) VALUES (?, ?, ?)",
                (experiment.name, json.dumps(settings), started),
            )
            sql.executemany(
                "INSERT INTO variants (experiment, name, policy, weight) VALUES (?, ?, ?, ?)",
                [(cursor.lastrowid, v.name, v.policy, v.weight) for v in experiment.variants],
            )
        return self.read(experiment.name).experiment

    def stop(self, name: str | None = None) -> Experiment:
        """Stop an experiment; None is the running one.

        Raises:
            ExperimentError: no such experiment is running.
        """
        with self._transaction("written") as sql:
            row = sql.execute(
                "SELECT id, name FROM experiments WHERE stopped_at IS NULL AND (?1 IS NULL OR name = ?1)", (name,)
            ).fetchone()
            if row is None:
                what = "no experiment" if name is None else f"no experiment {name!r}"
                raise ExperimentError(f"{what} is running in {self.path}.")
            sql.execute("UPDATE experiments SET stopped_at = ? WHERE id = ?", (time.time(), row[0]))
        return self.read(row[1]).experiment

    def running(self) -> Experiment | None:
        """The experiment that is running, if one is."""
        with self._explained("read"), self._lock:
            row = self._connection.execute("SELECT id FROM experiments WHERE stopped_at IS NULL").fetchone()
            return None if row is None else self._experiment(row[0])

    def version(self) -> int:
        """A number that changes with whatever is written, by any process."""
        with self._explained("read"), self._lock:
            of_others = self._connection.execute("PRAGMA data_version").fetchone()[0]
            return int(of_others) + self._connection.total_changes  # both only grow

    def read(self, name: str | None = None) -> StoredExperiment:
        """All about an experiment; None is the one that was started last.

        Raises:
            ExperimentError: there is none.
        """
        with self._explained("read"), self._lock, self._snapshot() as sql:
            row = sql.execute(
                "SELECT id FROM experiments WHERE ?1 IS NULL OR name = ?1 ORDER BY id DESC LIMIT 1", (name,)
            ).fetchone()
            if row is None:
                what = "no experiment" if name is None else f"no experiment {name!r}"
                raise ExperimentError(f"there is {what} in {self.path}.")
            experiment = self._experiment(row[0])
            details = sql.execute(
                "SELECT id, name, num_requests, stop_results FROM variants WHERE experiment = ? ORDER BY id", row
            ).fetchall()
            return StoredExperiment(
                experiment,
                {name: self._sums(identity) for identity, name, _, _ in details},
                {name: count for _, name, count, _ in details},
                {name: json.loads(results) for _, name, _, results in details if results},
            )

    def stop_variant(self, experiment: str, variant: str, reason: str, results: dict[str, Any]) -> bool:
        """Stop a variant: its requests go to the control, its figures stay as they are.

        Args:
            experiment: the experiment's name.
            variant: the variant's name.
            reason: the sentence.
            results: what the decision was made on.

        Returns:
            Whether it ran until now.
        """
        with self._transaction("written") as sql:
            changed = sql.execute(
                "UPDATE variants SET stopped_at = ?, stop_reason = ?, stop_results = ? "
                "WHERE name = ? AND stopped_at IS NULL "
                "AND experiment = (SELECT id FROM experiments WHERE name = ? AND stopped_at IS NULL)",
                (time.time(), reason, json.dumps(results), variant, experiment),
            )
            return changed.rowcount > 0

    # Requests

    def record(self, records: Iterable[RequestRecord | ScoreRecord]) -> None:
        """Write finished requests and scores, all or none; when this returns they are on the disk.

        A request or a score that is there already is left as it is, so a transaction whose outcome is unknown
        can be repeated. Records of experiments and variants that do not exist are dropped.

        Raises:
            ExperimentError: nothing was written.
        """
        with self._transaction("written") as sql:
            batch = _Batch(sql)
            for record in records:
                if isinstance(record, RequestRecord):
                    batch.add_request(record)
                else:
                    batch.add_score(record)
            batch.finish()

    # How it is done

    def _prepare_unlocked(self) -> None:
        """Prepare, however many others do so at once: SQLite does not wait for locks while it turns to WAL."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self._prepare()
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _prepare(self) -> None:
        sql = self._connection
        tables = sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and sql.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise ExperimentError(f"{self.path} is a database, but not one of A/B tests: choose another file.")
        if not tables:
            sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("PRAGMA synchronous = FULL")
        sql.execute("PRAGMA journal_size_limit = 4194304")
        if not tables:
            with self._transaction("written"):
                # Another process may have been first.
                if not sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _SCHEMA.split(";")[:-1]:
                        sql.execute(statement)
                    sql.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    sql.execute(f"PRAGMA user_version = {_VERSION}")
        version = sql.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise ExperimentError(f"{self.path} was written by another version (format {version}, not {_VERSION}).")

    def _experiment(self, identity: int) -> Experiment:
        name, settings, started_at, stopped_at = self._connection.execute(
            "SELECT name, settings, started_at, stopped_at FROM experiments WHERE id = ?", (identity,)
        ).fetchone()
        variants = self._connection.execute(
            "SELECT name, policy, weight, stopped_at, stop_reason FROM variants WHERE experiment = ? ORDER BY id",
            (identity,),
        ).fetchall()
        values = json.loads(settings)
        return Experiment(
            name,
            tuple(Variant(*row) for row in variants),
            tuple(Guardrail.parse(text) for text in values["guardrails"]),
            values["alpha"],
            values["score_share"],
            values["max_rows"],
            started_at,
            stopped_at,
        )

    def _sums(self, variant: int) -> dict[str, Moments]:
        rows = self._connection.execute(
            "SELECT metric, count, mean, squares, cubes FROM sums WHERE variant = ?", (variant,)
        ).fetchall()
        found = {row[0]: Moments(*row[1:]) for row in rows}
        return {name: found.get(name, NO_MOMENTS) for name in QUANTITIES}

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """Reads that belong to one moment."""
        self._connection.execute("BEGIN")
        try:
            yield self._connection
        finally:
            self._connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        with self._explained(what), self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # some errors have rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ExperimentError(f"the A/B database {self.path} cannot be {what}: {error}.") from None
        except OSError as error:
            raise ExperimentError(f"the A/B database {self.path} cannot be {what}: {error.strerror}.") from None


class _Batch:
    """The records of one transaction, with the sums that they change."""

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql
        self._variants: dict[tuple[str, str], tuple[int, bool] | None] = {}
        self._sums: dict[tuple[int, str], Moments] = {}
        self._num_requests: dict[int, int] = {}

    def add_request(self, record: RequestRecord) -> None:
        found = self._variant(record.experiment, record.variant)
        if found is None:
            return
        variant, running = found
        unit = hash64(record.experiment, record.unit) - (1 << 63)
        counted = record.counted and running and not self._is_known(unit)
        inserted = self._sql.execute(
            "INSERT OR IGNORE INTO requests (variant, request_id, unit, counted, finished_at, outcome, latency, ttft, "
            "num_prompt_tokens, num_tokens, avg_k) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                variant,
                record.request_id,
                unit,
                counted,
                record.finished_at,
                record.outcome,
                record.latency_seconds,
                record.ttft_seconds,
                record.num_prompt_tokens,
                record.num_tokens,
                record.avg_k,
            ),
        )
        if inserted.rowcount:
            self._num_requests[variant] = self._num_requests.get(variant, 0) + 1
            if counted:
                self._observe(variant, record.observations())

    def add_score(self, record: ScoreRecord) -> None:
        row = self._sql.execute(
            "SELECT requests.id, variant, counted, variants.stopped_at IS NULL FROM requests "
            "JOIN variants ON variants.id = variant WHERE request_id = ? AND answer_logprob IS NULL",
            (record.request_id,),
        ).fetchone()
        if row is None:
            return
        identity, variant, counted, running = row
        self._sql.execute(
            "UPDATE requests SET answer_logprob = ?, best_logprob = ?, own_logprob = ?, agreement = ? WHERE id = ?",
            (record.answer_logprob, record.best_logprob, record.own_logprob, record.agreement, identity),
        )
        if counted and running:
            self._observe(variant, record.observations())

    def finish(self) -> None:
        """Write the sums, and let go of the oldest requests beyond the limit."""
        self._sql.executemany(
            "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (variant, metric) DO UPDATE SET "
            "count = excluded.count, mean = excluded.mean, squares = excluded.squares, cubes = excluded.cubes",
            [(*key, *moments) for key, moments in self._sums.items()],
        )
        self._sql.executemany(
            "UPDATE variants SET num_requests = num_requests + ? WHERE id = ?",
            [(count, variant) for variant, count in self._num_requests.items()],
        )
        if self._num_requests:
            self._sql.execute(
                "DELETE FROM requests WHERE id <= (SELECT max(id) FROM requests) - (SELECT max("
                "json_extract(settings, '$.max_rows')) FROM experiments WHERE id = (SELECT max(id) FROM experiments))"
            )

    def _variant(self, experiment: str, name: str) -> tuple[int, bool] | None:
        """Its number and whether it runs; None if it does not exist."""
        key = (experiment, name)
        if key not in self._variants:
            row = self._sql.execute(
                "SELECT variants.id, variants.stopped_at IS NULL AND experiments.stopped_at IS NULL FROM variants "
                "JOIN experiments ON experiments.id = experiment WHERE experiments.name = ? AND variants.name = ?",
                key,
            ).fetchone()
            self._variants[key] = None if row is None else (row[0], bool(row[1]))
        return self._variants[key]

    def _is_known(self, unit: int) -> bool:
        return self._sql.execute("SELECT 1 FROM requests WHERE unit = ? LIMIT 1", (unit,)).fetchone() is not None

    def _observe(self, variant: int, values: dict[str, float]) -> None:
        for metric, value in values.items():
            key = (variant, metric)
            if key not in self._sums:
                row = self._sql.execute(
                    "SELECT count, mean, squares, cubes FROM sums WHERE variant = ? AND metric = ?", key
                ).fetchone()
                self._sums[key] = NO_MOMENTS if row is None else Moments(*row)
            self._sums[key] = self._sums[key].add(value)
