"""Hardware by name or file; damage is named before anything is planned."""
from __future__ import annotations

import json

import pytest

from copd_megatron.simulate.hardware import BUILT_IN, load_hardware
from copd_megatron.types import UserError


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_written_file_reads_back_the_same(name, tmp_path):
    file = tmp_path / "hardware.json"
    file.write_text(BUILT_IN[name].to_json())
    assert load_hardware(str(file)) == load_hardware(name) == BUILT_IN[name]


def damaged(**changes) -> str:
    return json.dumps({key: value for key, value in (json.loads(BUILT_IN["h100"].to_json()) | changes).items()
                       if value is not None})


@pytest.mark.parametrize(("content", "message"), [
    ("{", "is no JSON"), ("[]", "holds a list"), (damaged(memory_bytes=None), "'memory_bytes' is missing"),
    (damaged(flops=1), "'flops' is unknown"),
    (damaged(memory_bytes=-1), "hardware.memory_bytes: -1; allowed is above 0"),
    (damaged(memory_bytes="80"), "hardware.memory_bytes: '80'"), (damaged(peak_flops=7), "peak_flops is 7"),
    (damaged(achieved={"bfloat16": 2}), "hardware.achieved.bfloat16: 2; allowed is above 0, at most 1"),
    (damaged(ranks_per_node=0), "hardware.ranks_per_node: 0"), (damaged(usable=float("nan")), "hardware.usable: nan")])
def test_a_damaged_file_says_what_is_wrong(content, message, tmp_path):
    file = tmp_path / "hardware.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_hardware(str(file))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="'H100x' is neither built in nor a file; .* did you mean h100"):
        load_hardware("H100x")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="model.dtype: float8"):
        BUILT_IN["h100"].flops("float8")
