"""Low-rank residuals: better than the row alone, exact where the error has that rank, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from qigen.errors import BadInput, Unsupported
from qigen.formats import Layout, by_name, int_row, pack, unpack, validate, with_low_rank
from qigen.quantize import quantize, quantize_matrix, quantize_rtn


def normal(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


@pytest.mark.parametrize("name", ["s3g128", "z2g64", "nf3g64", "lut3_channel", "mxfp4", "q4_0",
                                  "bipolar2", "ternary5", "s4g128_2of4", "s4g128_o3"])
@pytest.mark.parametrize("n,k", [(48, 300), (5, 70)])
def test_nearer_than_the_row_alone(name: str, n: int, k: int) -> None:
    w = normal(n, k) + 0.3 * normal(n, 3, 1) @ normal(3, k, 2)
    k -= k % by_name(name).block if by_name(name).ggml_type is not None else 0
    w = np.ascontiguousarray(w[:, :k])
    row = by_name(f"{name}_lr16")
    tensor = quantize_rtn(w, row)
    validate(tensor, "w")
    alone = np.square(quantize_rtn(w, by_name(name)).dequantize() - w).sum()
    assert np.square(tensor.dequantize() - w).sum() < alone
    again = unpack(row, w.shape, Layout(blocks=2), pack(tensor, Layout(blocks=2)))
    np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())


def test_weights_of_low_rank_are_kept() -> None:
    """A group of equal weights of one magnitude is exact in 2 bits: the rest has rank 8."""
    w = np.where(normal(64, 256) > 0, np.float32(1), np.float32(-1))
    w += 0.25 * normal(64, 8, 1) @ normal(8, 256, 2)
    error = np.abs(quantize_rtn(w, by_name("bipolar1_lr16")).dequantize() - w).max()
    assert error < 0.5 * np.abs(quantize_rtn(w, by_name("bipolar1")).dequantize() - w).max()


def test_a_rank_above_the_shape_makes_up_for_everything() -> None:
    w = normal(7, 90)
    assert np.abs(quantize_rtn(w, by_name("s2g32_lr16")).dequantize() - w).max() < 4e-3


def test_columns_count_by_their_inputs() -> None:
    """With a Hessian the factors serve the columns whose inputs are large."""
    w, h = normal(40, 128), np.diag(np.r_[np.full(16, 100.0), np.full(112, 0.01)])
    row = by_name("s2g32_lr16")
    plain, weighed = (quantize(w, row, method="clip", hessian=x) for x in (None, h))
    miss = [np.square(t.dequantize() - w)[:, :16].sum() for t in (plain, weighed)]
    assert miss[1] < 0.1 * miss[0]


@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_other_methods_round_the_base(method: str) -> None:
    x = normal(400, 96, 3)
    w, row = normal(24, 96), by_name("u3g32_lr16")
    h = x.T @ x / len(x)
    tensor, report = quantize_matrix(w, row, method, h)
    _, alone = quantize_matrix(w, by_name("u3g32"), method, h)
    assert tensor.format is row and report.format == row.name and report.error < alone.error


def test_refusals() -> None:
    for name in ("s4g128_lr8", "s4g128_lr0", "s4g128_lr272", "s4g128_lr17"):
        with pytest.raises(Unsupported, match="multiple of 16 up to 256"):
            by_name(name)
    for name in ("f16_lr16", "s4g128_lr16_lr16"):
        with pytest.raises(Unsupported, match="cannot have a low-rank residual"):
            by_name(name)
    assert by_name("s4g128_lr16").sparsity == "rank 16"
    assert with_low_rank(int_row("s", 4, 64), 64).name == "s4g64_lr64"
    with pytest.raises(BadInput, match="too large for"):
        quantize_rtn(np.full((16, 64), 3e38, np.float32) * normal(16, 64).clip(-1, 1),
                     by_name("s4g32_f32_lr16"))


def test_damaged_factors_are_found() -> None:
    tensor = quantize_rtn(normal(5, 64), by_name("s4g32_lr16"))
    for name in ("la", "lb"):
        kept = tensor.fields[name].copy()
        tensor.fields[name][..., 3] = 0x7C00
        with pytest.raises(BadInput, match=f"'{name}'"):
            validate(tensor, "blk.0.attn_q.weight")
        tensor.fields[name][...] = kept
