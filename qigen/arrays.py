"""Named arrays in .npy files: what goes into a model and what comes out of it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qigen.errors import BadInput, UsageError

Array = NDArray[Any]

_NAME_LENGTH = 200  # of a file, at most


def parse_files(entries: Iterable[str]) -> dict[str, Path]:
    """Files by name, from ``NAME=FILE.npy`` each. UsageError if one is not like that."""
    files: dict[str, Path] = {}
    for entry in entries:
        # names of tensors may have '=' in them, and files may: the first file that is there wins
        cuts = [i for i, c in enumerate(entry) if c == "=" and 0 < i < len(entry) - 1]
        found = [i for i in cuts if Path(entry[i + 1 :]).exists()]
        if not cuts or entry[: (found or cuts)[0]] in files:
            raise UsageError(f"--input {entry}: write NAME=FILE.npy, each name once")
        cut = (found or cuts)[0]
        files[entry[:cut]] = Path(entry[cut + 1 :])
    return files


def read_array(file: Path) -> Array:
    """The array in a .npy file. BadInput if there is none."""
    where = str(file)
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"the file cannot be read ({error.strerror or error})", where) from None
    except MemoryError:
        raise BadInput("the array does not fit into memory", where) from None
    except Exception as error:  # whatever a damaged header makes numpy raise
        problem = " ".join(str(error).split())
        raise BadInput(f"this is no .npy file of numbers ({problem})", where) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise BadInput("this is an archive; give a single array", where)
    return array


def read_inputs(files: Mapping[str, Path], wanted: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """The arrays for a model's inputs, ``wanted`` (name and dtype each).

    .npy files cannot name types that numpy does not have, such as bfloat16: raw bytes of the right
    size are taken for them. Raises BadInput for files that are no arrays and for names that the
    model does not have or that are missing.
    """
    arrays = {name: read_array(file) for name, file in files.items()}
    dtypes = {str(entry["name"]): str(entry["dtype"]) for entry in wanted}
    for name in files:
        if name not in dtypes:
            raise BadInput(f"the model has no such input; it has {', '.join(dtypes)}", name)
    missing = [name for name in dtypes if name not in files]
    if missing:
        raise BadInput(f"input {missing[0]} is missing; give all of {', '.join(dtypes)}")
    return {name: _typed(array, dtypes[name]) for name, array in arrays.items()}


def _typed(array: Array, dtype: str) -> Array:
    foreign = getattr(ml_dtypes, dtype, None)
    if array.dtype.kind == "V" and array.dtype.fields is None and foreign is not None:
        wanted = np.dtype(foreign)
        if wanted.itemsize == array.dtype.itemsize:
            return array.view(wanted)
    return array


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A file's name for every tensor's: other characters than letters, digits and ``_+-.`` become
    ``_``, and no two names are equal."""
    result: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w+.-]", "_", name)[:_NAME_LENGTH]
        stem = re.sub(r"^[.-]", "_", stem) or "_"
        own, n = stem, 1
        while own in result.values():
            n += 1
            own = f"{stem}_{n}"
        result[name] = own
    return result


def write_arrays(folder: Path, arrays: Mapping[str, Array]) -> dict[str, Path]:
    """Write each array to ``NAME.npy`` in a folder; the files by name.

    On a failure no file is there that was not there before, and none has changed.
    """
    files = {n: folder / f"{stem}.npy" for n, stem in file_names(arrays).items()}
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    drafts: dict[Path, Path] = {}
    try:
        for name, file in files.items():
            draft = folder / f".{os.getpid()}.{len(drafts)}"
            drafts[draft] = file
            with draft.open("wb") as stream:
                np.save(stream, arrays[name])
        for draft, file in drafts.items():
            draft.replace(file)
    except BaseException:
        # the failure that led here is the one to report
        with contextlib.suppress(OSError):
            for draft in drafts:
                draft.unlink(missing_ok=True)
            if made:
                folder.rmdir()
        raise
    return files


def parse_shapes(entries: Iterable[str]) -> dict[str, list[str]]:
    """Sizes by name, from ``NAME=1x3x?x..640`` each; ``NAME=`` is a scalar."""
    shapes: dict[str, list[str]] = {}
    for entry in entries:
        name, equals, text = entry.rpartition("=")
        if not (name and equals):
            raise UsageError(f"--shape {entry}: write NAME=1x3x640x640; a size may be ? or ..LIMIT")
        if name in shapes:
            raise UsageError(f"--shape gives {name} twice")
        shapes[name] = text.split("x") if text else []
    return shapes
