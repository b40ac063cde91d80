from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from qigen.errors import BadInput
from qigen.ir.plan import Alternative, KernelChoice, Plan, Resource

CHOICE = KernelChoice(
    name="gemv_q4_0_a8__avx512vnni_1x32",
    op="MatMulGroup",
    format="q4_0",
    n=4096,
    k=4096,
    m_bucket=1,
    schedule={"m_tile": 1, "row_tile": 32, "kblocks": 4, "unrolled": True, "order": "rows"},
    predicted_us=188.5,
    predicted_bytes=9437184,
    predicted_instructions=3.1e6,
    bound="memory",
    runners_up=(Alternative({"row_tile": 16}, 201.0, "instructions", "more instructions"),),
    resources=(Resource("memory", "bytes", 9437184, 40.0, 188.0),),
    reason="longest sequential stream that fits the registers",
)
PLAN = Plan("native", "avx512vnni", "int8", "f16", 2, 512, (CHOICE,))


def test_round_trip() -> None:
    text = json.dumps(PLAN.to_json())
    assert Plan.from_json(json.loads(text)) == PLAN
    assert json.loads(text)["version"] == 1
    whole = copy.deepcopy(PLAN.to_json())
    whole["kernels"][0]["predicted_us"] = 188  # JSON writers drop ".0"
    assert Plan.from_json(whole).kernels[0].predicted_us == 188.0
    del whole["kernels"][0]["runners_up"], whole["kernels"][0]["reason"]
    assert Plan.from_json(whole).kernels[0].runners_up == ()


def test_find() -> None:
    assert PLAN.find("MatMulGroup", "q4_0", 4096, 4096, 1) is CHOICE
    assert PLAN.buckets("MatMulGroup", "q4_0", 4096, 4096) == (1,)
    assert PLAN.buckets("MatMulGroup", "q4_0", 4096, 64) == ()
    with pytest.raises(BadInput, match="no kernel for MatMulGroup q4_0 4096x4096 m=16"):
        PLAN.find("MatMulGroup", "q4_0", 4096, 4096, 16)


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        (["version"], 2, "plan", "version is 2, not 1"),
        (["threads_hint"], 0, "plan", "threads_hint must be at least 1"),
        (["threads_hint"], 1.5, "plan", "must be a int"),
        (["threads_hint"], True, "plan", "must be a int"),
        (["target"], None, "plan", "target must be a str"),
        (["kernel"], [], "plan", "no field 'kernel'; did you mean kernels"),
        (["kernels"], {}, "plan.kernels", "a list was expected"),
        (["kernels", 0, "resources"], {}, "plan.kernels[0].resources", "a list was expected"),
        (["kernels", 0, "resources", 0, "us"], -1, "resource memory", "a finite number"),
        (["kernels", 0], 3, r"plan.kernels[0]", "an object was expected"),
        (["kernels", 0, "n"], 0, f"kernel {CHOICE.name}", "n must be at least 1"),
        (["kernels", 0, "n"], -1, f"kernel {CHOICE.name}", "finite number from 0"),
        (["kernels", 0, "name"], "", "plan", "needs a name"),
        (["kernels", 0, "predicted_us"], float("nan"), f"kernel {CHOICE.name}", "finite number"),
        (["kernels", 0, "predicted_us"], "3", f"kernel {CHOICE.name}", "must be a float"),
        (["kernels", 0, "schedule"], [], f"kernel {CHOICE.name}, schedule", "an object"),
        (["kernels", 0, "schedule", "m_tile"], [1], f"kernel {CHOICE.name}", "cannot be"),
        (["kernels", 0, "runners_up"], 1, "plan.kernels[0].runners_up", "a list was expected"),
        (["kernels", 0, "runners_up", 0, "us"], 1, "plan.kernels[0].runners_up[0]", "no field"),
        (["kernels", 0, "runners_up", 0, "predicted_us"], -1.0, "runner-up", "finite number"),
    ],
)
def test_edited_plans_are_checked(path: list[Any], value: Any, where: str, message: str) -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BadInput, match=message) as error:
        Plan.from_json(data)
    assert error.value.where == where


@pytest.mark.parametrize("field", ["isa", "max_tokens"])
def test_missing_fields(field: str) -> None:
    data = PLAN.to_json()
    del data[field]
    with pytest.raises(BadInput, match=f"'{field}' is missing"):
        Plan.from_json(data)
    del (kernel := PLAN.to_json())["kernels"][0]["bound"]
    with pytest.raises(BadInput, match="'bound' is missing"):
        Plan.from_json(kernel)
    with pytest.raises(BadInput, match="an object was expected, not list"):
        Plan.from_json([])


def test_two_kernels_for_one_product() -> None:
    with pytest.raises(BadInput, match="two kernels for one product"):
        Plan("native", "scalar", "f32", "f16", 1, 64, (CHOICE, CHOICE))
