"""What was measured, kept in the user's data folder: SQLite, safe with several processes.

An entry is valid for one machine, compiler and kernel (the hash of its source), shape, number of
tokens and threads, and for weights that came from memory or from the caches. Entries that another
machine of the same kind exported can be imported; those that come with the package are the last
resort.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qigen.backends.base import Isa
from qigen.backends.cpu.gemm import PER, GemmSpec, Tiles
from qigen.backends.cpu.isa import by_name as isa_by_name
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.costmodel.gemm import GemmShape
from qigen.errors import BadInput, QigenError, Unsupported
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout
from qigen.paths import data_folder
from qigen.targets import Machine
from qigen.targets.calibrate import processor

FORMAT = 1
"""Version of the exported JSON and of the tables."""

_APPLICATION = 0x5147444E  # "QGDN" in the header of the file
STATUSES = ("ok", "wrong", "crash", "timeout")
HOMES = ("memory", "cache")
DEFAULTS = Path(__file__).parent / "defaults"


@dataclass(frozen=True)
class Entry:
    """One measurement. ``machine``, ``compiler`` and ``kernel`` are hashes (see
    :func:`machine_key`, :func:`compiler_key`, :func:`qigen.tuning.measure.kernel_text`); ``spec``
    is what :func:`spec_to_json` gives, or :func:`gemm_to_json` for a product or convolution of a
    graph (``k`` are then the products of a sum, ``m`` pixels); ``home`` says where the weights came
    from; ``us`` is 0 unless ``status`` is 'ok'."""

    machine: str
    compiler: str
    kernel: str
    n: int
    k: int
    m: int
    threads: int
    home: str
    spec: Mapping[str, Any]
    status: str
    us: float
    spread: float
    runs: int
    date: str
    about: str = ""


_COLUMNS = tuple(f.name for f in dataclasses.fields(Entry))
_KEY = ("machine", "compiler", "kernel", "n", "k", "m", "threads", "home")
_TABLE = f"""
CREATE TABLE IF NOT EXISTS entries (
  machine TEXT NOT NULL, compiler TEXT NOT NULL, kernel TEXT NOT NULL,
  n INTEGER NOT NULL, k INTEGER NOT NULL, m INTEGER NOT NULL, threads INTEGER NOT NULL,
  home TEXT NOT NULL, spec TEXT NOT NULL, status TEXT NOT NULL, us REAL NOT NULL,
  spread REAL NOT NULL, runs INTEGER NOT NULL, date TEXT NOT NULL, about TEXT NOT NULL,
  PRIMARY KEY ({", ".join(_KEY)})
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (
  machine TEXT NOT NULL, model TEXT NOT NULL, knob TEXT NOT NULL, value INTEGER NOT NULL,
  tok_s REAL NOT NULL, date TEXT NOT NULL,
  PRIMARY KEY (machine, model, knob, value)
) WITHOUT ROWID;
"""


def _hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def machine_key(machine: Machine) -> str:
    """The kind of this machine: the processor, its features and caches. Not the cores: threads are
    part of every entry."""
    caches = (machine.l1d_bytes, machine.l2_bytes, machine.l3_bytes)
    return _hash(processor(), tuple(sorted(machine.features)), caches)


def compiler_key(version: str) -> str:
    """The hash of a compiler's version line."""
    return _hash(version)


def spec_to_json(spec: MatmulSpec) -> dict[str, Any]:
    """A kernel as data; :func:`spec_from_json` is the inverse."""
    return {
        "format": spec.format.name,
        "rows": spec.layout.rows,
        "blocks": spec.layout.blocks,
        "isa": spec.isa.name,
        "activations": spec.activations,
        "tiles": list(spec.tiles),
        "prefetch": spec.prefetch,
        "streams": spec.streams,
    }


def spec_from_json(data: Mapping[str, Any]) -> MatmulSpec:
    """The kernel; KeyError, ValueError, TypeError or Unsupported if the data are none."""
    return MatmulSpec(
        by_name(str(data["format"])),
        Layout(int(data["rows"]), int(data["blocks"])),
        isa_by_name(str(data["isa"])),
        str(data["activations"]),
        tuple(int(t) for t in data["tiles"]),
        int(data["prefetch"]),
        int(data["streams"]),
    )


GEMM = "gemm"
"""The family of products and convolutions of graphs; matmul kernels name none."""


def gemm_spec(isa: Isa, arithmetic: str, tiles: Tiles) -> GemmSpec:
    """The kernel that stands for all with these tiles when they are measured: sums alone, as every
    tiling has the same epilogue."""
    return GemmSpec(isa, arithmetic, output="i32" if arithmetic == "u8s8" else "f32", chosen=tiles)


def gemm_to_json(spec: GemmSpec, shape: GemmShape) -> dict[str, Any]:
    """A kernel of the gemm family and its call as data; :func:`gemm_from_json` is the inverse."""
    return {
        "family": GEMM,
        "isa": spec.isa.name,
        "arithmetic": spec.arithmetic,
        "tiles": dataclasses.asdict(spec.tiles),
        "shape": dataclasses.asdict(shape) | {"offsets": list(shape.offsets)},
    }


def gemm_from_json(data: Mapping[str, Any]) -> tuple[GemmSpec, GemmShape]:
    """The kernel and its call; KeyError, ValueError, TypeError or Unsupported if the data are
    none."""
    tiles, arithmetic = Tiles(**data["tiles"]), str(data["arithmetic"])
    if arithmetic not in PER:
        raise ValueError(f"arithmetic {arithmetic}")
    return gemm_spec(isa_by_name(str(data["isa"])), arithmetic, tiles), shape_from_json(
        data["shape"]
    )


def shape_from_json(data: Mapping[str, Any]) -> GemmShape:
    """What ``dataclasses.asdict`` made of a shape; KeyError, ValueError or TypeError if it is none.
    """
    offsets = tuple(int(o) for o in data["offsets"])
    shape = GemmShape(**{**data, "offsets": offsets})
    sizes = (shape.n, shape.k, shape.taps, shape.columns, shape.rows, shape.images, shape.pixel)
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"shape {shape}")
    if offsets and (len(offsets) != shape.taps or min(offsets) < 0):
        raise ValueError(f"offsets of {shape.taps} taps: {offsets}")
    return shape


def gemm_key(kernel: str, shape: GemmShape) -> str:
    """``Entry.kernel`` of a call, where the hash of its kernel's source is ``kernel``: N, K and M
    alone do not say how x lies."""
    return f"{kernel}-{_hash(dataclasses.astuple(shape))}"


def now() -> str:
    """The time for ``Entry.date``."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def database_file() -> Path:
    """Where the database lies: in QIGEN_DATA, else in the user's data folder."""
    return data_folder() / "tuning.sqlite"


class Database:
    """The tuning database. Use as a context manager.

    Raises QigenError if the file cannot be written, BadInput if it is damaged or something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else database_file()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from None
        with self._errors():
            self._connection = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        ask = self._connection.execute
        (application,) = ask("PRAGMA application_id").fetchone()
        (tables,) = ask("SELECT count(*) FROM sqlite_master").fetchone()
        if application != _APPLICATION and (application or tables):
            raise BadInput(
                "this is no tuning database of qigen; move it away or set QIGEN_DATA to another "
                "folder",
                str(self.path),
            )
        (version,) = ask("PRAGMA user_version").fetchone()
        if version > FORMAT:
            raise BadInput(
                f"it was written by a newer qigen (version {version}, this one reads {FORMAT}); "
                "update qigen or move the file away",
                str(self.path),
            )
        if application != _APPLICATION or version < FORMAT:
            ask("PRAGMA journal_mode = WAL")
            # several processes may come here at once: all of this can be done twice
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_TABLE} PRAGMA application_id = {_APPLICATION}; "
                f"PRAGMA user_version = {FORMAT}; COMMIT;"
            )
        ask("PRAGMA synchronous = NORMAL")

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of SQLite in our words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._unwritable(str(error)) from None
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"the tuning database is damaged ({error}); delete it, and import what you "
                "exported before",
                str(self.path),
            ) from None

    def _unwritable(self, why: str) -> QigenError:
        return QigenError(
            f"the tuning database cannot be used ({why}); set QIGEN_DATA to a folder of yours",
            str(self.path),
        )

    def add(self, entries: Iterable[Entry]) -> None:
        """Stores measurements at once, in place of older ones of the same kernel and shape."""
        rows = [
            tuple(
                json.dumps(value) if name == "spec" else value
                for name, value in ((c, getattr(entry, c)) for c in _COLUMNS)
            )
            for entry in entries
        ]
        places = ", ".join("?" * len(_COLUMNS))
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(
                    f"INSERT OR REPLACE INTO entries ({', '.join(_COLUMNS)}) VALUES ({places})",
                    rows,
                )
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def entries(self, **where: object) -> list[Entry]:
        """The entries whose columns have these values."""
        assert set(where) <= set(_COLUMNS)
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        with self._errors():
            rows = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM entries WHERE {condition} "
                f"ORDER BY {', '.join(_KEY)}",
                tuple(where.values()),
            ).fetchall()
        return [self._entry(row) for row in rows]

    def _entry(self, row: Sequence[Any]) -> Entry:
        values = dict(zip(_COLUMNS, row, strict=True))
        try:
            values["spec"] = json.loads(values["spec"])
            return checked(values)
        except ValueError as error:
            raise BadInput(
                f"the tuning database holds an entry that is none ({error}); delete it",
                str(self.path),
            ) from None

    def add_model(self, machine: str, model: str, knob: str, value: int, tok_s: float) -> None:
        """Stores what a compiled model reached with a value of a whole-model knob."""
        with self._errors():
            self._connection.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?)",
                (machine, model, knob, value, tok_s, now()),
            )

    def model(self, machine: str, model: str, knob: str) -> dict[int, float]:
        """Tokens a second by value of a knob."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT value, tok_s FROM models WHERE machine = ? AND model = ? AND knob = ?",
                (machine, model, knob),
            ).fetchall()
        return {int(value): float(tok_s) for value, tok_s in rows}

    def export(self, path: str | os.PathLike[str], machine: str | None = None) -> int:
        """Writes the entries (of one machine) as JSON; how many there are."""
        found = self.entries(**({"machine": machine} if machine else {}))
        data = {"qigen_tuning": FORMAT, "entries": [dataclasses.asdict(e) for e in found]}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return len(found)

    def export_defaults(self, path: str | os.PathLike[str], machine: str) -> int:
        """Writes what comes with the package for a kind of machine: its kernels that are right,
        those of the sources of today; how many there are. An entry a line, ordered, so that a
        later measurement changes few lines."""
        from qigen.tuning.measure import kernel_text

        kernel = functools.lru_cache(None)(lambda spec: kernel_text(spec)[1])

        def today(entry: Entry) -> str:
            if entry.spec.get("family") == GEMM:
                spec, shape = gemm_from_json(entry.spec)
                return gemm_key(kernel(spec), shape)
            return str(kernel(spec_from_json(entry.spec)))

        found = [e for e in self.entries(machine=machine, status="ok") if today(e) == e.kernel]
        lines = [json.dumps(dataclasses.asdict(e), sort_keys=True) for e in found]
        text = ",\n".join(lines)
        Path(path).write_text(
            f'{{"qigen_tuning": {FORMAT}, "entries": [\n{text}\n]}}\n', encoding="utf-8"
        )
        return len(found)

    def import_(self, path: str | os.PathLike[str]) -> tuple[int, int]:
        """Takes the entries of an exported file in; (how many were new, how many there are).

        What was measured here stays, unless the file has a later measurement of the same. Dates
        that lie in the future come from a clock that is wrong and are no reason to replace.
        """
        entries = read_export(Path(path))
        known = {_key(e): e for e in self.entries()}
        today = now()
        taken = [
            e
            for e in entries
            if (old := known.get(_key(e))) is None or old.date < e.date <= today
        ]
        self.add(taken)
        return len(taken), len(entries)


def _key(entry: Entry) -> tuple[object, ...]:
    return tuple(getattr(entry, name) for name in _KEY)


def read_export(path: Path) -> list[Entry]:
    """The entries of an exported file; BadInput if it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror})", str(path)) from None
    except ValueError:
        raise BadInput("this is no JSON; give what qigen tune export wrote", str(path)) from None
    version = data.get("qigen_tuning") if isinstance(data, dict) else None
    if version is None:
        raise BadInput("this is no export of qigen tune", str(path))
    if version != FORMAT:
        raise BadInput(f"the export has version {version}, this qigen reads {FORMAT}", str(path))
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise BadInput("the export has no list of entries", str(path))
    found = []
    for i, entry in enumerate(entries):
        try:
            found.append(checked(dict(entry)))
        except (ValueError, TypeError) as error:
            raise BadInput(f"entry {i} is none: {error}", str(path)) from None
    return found


def checked(values: dict[str, Any]) -> Entry:
    """An entry from its values by name; ValueError says what does not fit."""
    if set(values) != set(_COLUMNS):
        missing = sorted(set(_COLUMNS) ^ set(values))
        raise ValueError(f"fields {', '.join(missing)} are missing or unknown")
    for name, value in values.items():
        if name == "spec":
            try:
                (gemm_from_json if value.get("family") == GEMM else spec_from_json)(value)
            except (KeyError, TypeError, ValueError, Unsupported, AttributeError) as error:
                raise ValueError(f"its kernel is unknown ({error})") from None
        elif name in ("n", "k", "m", "threads", "runs"):
            if type(value) is not int or not 0 <= value < 1 << 40 or (name != "runs" and not value):
                raise ValueError(f"{name} is {value!r}")
        elif name in ("us", "spread"):
            if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}")
        elif not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}")
    if values["status"] not in STATUSES or values["home"] not in HOMES:
        raise ValueError(f"status {values['status']!r} or home {values['home']!r} is unknown")
    if values["status"] == "ok" and not values["us"]:
        raise ValueError("it has no time")
    return Entry(**values)


def defaults_file(machine: Machine) -> Path:
    """Where the measurements of a kind of machine come with the package."""
    name = "-".join(machine.archspec) or machine.architecture
    return DEFAULTS / f"{name}-{machine_key(machine)}.json"


@functools.lru_cache(maxsize=1)
def shipped() -> tuple[Entry, ...]:
    """The entries that come with the package, for the machines that it was measured on."""
    return tuple(e for path in sorted(DEFAULTS.glob("*.json")) for e in read_export(path))
