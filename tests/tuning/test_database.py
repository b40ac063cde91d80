"""The tuning database: what is stored comes back, and nothing that is damaged does harm."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qigen.backends.cpu.isa import ISAS
from qigen.backends.cpu.matmul import MatmulSpec
from qigen.errors import BadInput, QigenError
from qigen.formats.catalog import by_name
from qigen.formats.layout import Layout
from qigen.tuning.database import (
    DEFAULTS,
    Database,
    Entry,
    database_file,
    read_export,
    shipped,
    spec_from_json,
    spec_to_json,
)

SPEC = MatmulSpec(
    by_name("q4_0"), Layout(16, 2), ISAS["avx512vnni"], "int8", (8, 4, 1), prefetch=2048
)
ENTRY = Entry(
    machine="m", compiler="c", kernel="k", n=64, k=128, m=4, threads=2, home="memory",
    spec=spec_to_json(SPEC), status="ok", us=12.5, spread=0.1, runs=15, date="2026-01-02",
    about="a machine",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "tuning.sqlite"


def test_specs_are_data() -> None:
    assert spec_from_json(json.loads(json.dumps(spec_to_json(SPEC)))) == SPEC


def test_stored_entries_come_back(data: Path) -> None:
    crashed = replace(ENTRY, kernel="other", status="crash", us=0.0, about="SIGILL")
    with Database(data) as db:
        assert db.entries() == []
        db.add([ENTRY, crashed])
    with Database(data) as db:
        assert sorted(db.entries(), key=lambda e: e.kernel) == [ENTRY, crashed]
        assert db.entries(m=4, status="crash") == [crashed]
        assert db.entries(m=5) == []
        better = replace(ENTRY, us=11.0)
        db.add([better])
        assert db.entries(kernel="k") == [better]


def test_nothing_of_a_failed_batch_is_stored(data: Path) -> None:
    with Database(data) as db:
        with pytest.raises(QigenError):
            db.add([ENTRY, replace(ENTRY, kernel=None)])  # type: ignore[arg-type]
        assert db.entries() == []


def test_whole_models(data: Path) -> None:
    with Database(data) as db:
        for value, rate in ((1, 10.0), (2, 15.0), (2, 16.0)):
            db.add_model("m", "uid", "threads", value, rate)
        assert db.model("m", "uid", "threads") == {1: 10.0, 2: 16.0}
        assert db.model("m", "uid", "block") == {}


def test_several_processes(data: Path) -> None:
    """They create the file at once and write at the same time."""
    program = (
        "import sys; from dataclasses import replace\n"
        "from qigen.tuning.database import Database, Entry\n"
        f"e = {ENTRY!r}\n"
        f"for i in range(20):\n"
        f"    with Database({str(data)!r}) as d: d.add([replace(e, kernel=sys.argv[1] + str(i))])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, name]) for name in "abc"]
    assert [p.wait(60) for p in running] == [0, 0, 0]
    with Database(data) as db:
        assert len(db.entries()) == 60


def test_export_and_import(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "shared.json"
    with Database(data) as db:
        db.add([ENTRY, replace(ENTRY, machine="n")])
        assert db.export(file) == 2
        assert db.export(tmp_path / "one.json", "n") == 1
    assert read_export(file)[0] == ENTRY
    with Database(tmp_path / "other.sqlite") as db:
        assert db.import_(file) == (2, 2)
        assert db.import_(file) == (0, 2)


def test_the_later_measurement_wins_unless_the_clock_is_wrong(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "shared.json"

    def written(**changed: object) -> Path:
        with Database(tmp_path / "theirs.sqlite") as theirs:
            theirs.add([replace(ENTRY, **changed)])  # type: ignore[arg-type]
            theirs.export(file)
        return file

    with Database(data) as db:
        db.add([ENTRY])
        for date, us in (("2026-01-01", 12.5), ("2026-01-03", 9.0), ("2999-01-01", 9.0)):
            db.import_(written(date=date, us=9.0 if us == 9.0 else 1.0))
            assert [e.us for e in db.entries()] == [us]


@pytest.mark.parametrize("content", [b"no database, not a bit of one", b"SQLite format 3\0xxxx"])
def test_damaged_file(data: Path, content: bytes) -> None:
    data.parent.mkdir()
    data.write_bytes(content * 300)
    with pytest.raises(BadInput, match="damaged"), Database(data):
        pass
    assert data.read_bytes() == content * 300  # not touched


def test_damaged_pages(data: Path) -> None:
    with Database(data) as db:
        db.add([replace(ENTRY, kernel=f"{i}") for i in range(500)])
        db._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(data.read_bytes())
    content[8192:-4096] = b"\xa5" * (len(content) - 12288)
    data.write_bytes(content)
    with pytest.raises(BadInput, match="damaged"), Database(data) as db:
        db.entries()


def test_foreign_database(data: Path) -> None:
    data.parent.mkdir()
    with sqlite3.connect(data) as connection:
        connection.execute("CREATE TABLE photographs (name TEXT)")
    connection.close()
    with pytest.raises(BadInput, match="no tuning database"), Database(data):
        pass


def test_a_database_of_the_future(data: Path) -> None:
    with Database(data) as db:
        db._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(BadInput, match="newer"), Database(data):
        pass


def test_an_entry_that_is_none(data: Path) -> None:
    with Database(data) as db:
        db.add([ENTRY])
        db._connection.execute("UPDATE entries SET spec = '{\"format\": \"nonsense\"}'")
        with pytest.raises(BadInput, match="kernel is unknown"):
            db.entries()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QigenError, match="QIGEN_DATA"):
        Database(tmp_path / "file" / "tuning.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(QigenError, match="QIGEN_DATA"):
        Database(tmp_path / "folder")  # it is a folder itself


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QIGEN_DATA", str(tmp_path))
    assert database_file() == tmp_path / "tuning.sqlite"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"us": -1.0}, "us"), ({"us": 0.0}, "no time"), ({"n": 0}, "n is"), ({"m": 1.5}, "m is"),
     ({"status": "fine"}, "status"), ({"home": 3}, "home"), ({"spec": {}}, "unknown"),
     ({"spec": {**spec_to_json(SPEC), "isa": "z80"}}, "unknown"), ({"more": 1}, "more")],
)  # fmt: skip
def test_damaged_exports(tmp_path: Path, change: dict[str, object], words: str) -> None:
    file = tmp_path / "shared.json"
    entry = {**{f: getattr(ENTRY, f) for f in Entry.__dataclass_fields__}, **change}
    file.write_text(json.dumps({"qigen_tuning": 1, "entries": [entry]}))
    with pytest.raises(BadInput, match=f"entry 0.*{words}"):
        read_export(file)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"qigen_tuning": 2}', '{"qigen_tuning": 1, "entries": 3}']
)
def test_files_that_are_no_exports(tmp_path: Path, text: str) -> None:
    file = tmp_path / "shared.json"
    file.write_text(text)
    with pytest.raises(BadInput):
        read_export(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_export(tmp_path / "missing.json")


def test_what_comes_with_the_package() -> None:
    assert DEFAULTS.is_dir()
    for entry in shipped():
        assert entry.status == "ok" and entry.us > 0
