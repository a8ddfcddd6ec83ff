"""Apex and Transformer Engine: told apart by their files, never imported."""

import os
import subprocess
import sys

import pytest

from copd_megatron.optional import (
    apex_capabilities,
    apex_problem,
    choose_maker,
    refuse_harmful_parts,
    transformer_engine_problem,
)
from copd_megatron.types import UserError

POISON = "raise RuntimeError('must not be imported')\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Creates importable modules whose import fails."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(POISON)

    return make


def test_nothing_there():
    assert (apex_problem(), apex_capabilities()) == (None, ())


def test_foreign_apex(package):
    package("apex/__init__.py")
    assert "not NVIDIA's" in apex_problem()
    assert apex_capabilities() == ()
    with pytest.raises(UserError, match="environment: this apex is not NVIDIA's; pip uninstall apex"):
        refuse_harmful_parts(cuda_available=True)


def test_python_only_apex(package):
    package("apex/__init__.py", "apex/multi_tensor_apply/__init__.py")
    assert "APEX_CUDA_EXT=1" in apex_problem()


def test_sound_apex(package):
    package("apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py", "fused_layer_norm_cuda.py")
    assert apex_problem() is None
    assert apex_capabilities() == ("fused Adam", "fused layer norm")
    refuse_harmful_parts(cuda_available=True)


def test_who_computes_what_all_can(package):
    """Transformer Engine first, then an Apex that was built with the part, then torch; on a CPU torch."""
    def auto(part, cuda=True):
        return choose_maker("model.norms", "auto", part, cuda)

    assert auto("fused layer norm") == "torch"
    package("apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py")
    assert (auto("fused Adam"), auto("fused layer norm"), auto("fused Adam", cuda=False)) == ("apex", "torch", "torch")
    with pytest.raises(UserError, match=r"^model.norms: te, but it is missing; possible here: apex, torch; pip"):
        choose_maker("model.norms", "te", "fused Adam", True)
    package("transformer_engine/__init__.py")
    assert auto("fused Adam") == "te" and choose_maker("model.norms", "torch", "fused Adam", True) == "torch"


@pytest.mark.parametrize("files,message", [
    (("apex/__init__.py",), "this apex is not NVIDIA's; pip uninstall apex"),
    (("apex/__init__.py", "apex/multi_tensor_apply/__init__.py"), "rebuild it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1")])
def test_a_harmful_apex_ends_a_command_with_the_fix(tmp_path, package, files, message):
    """As an environment has it: on the path of a process of its own, of which nothing is imported."""
    package(*files)
    code = "from copd_megatron.optional import refuse_harmful_parts; refuse_harmful_parts(True)"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "UserError: environment: " in done.stderr and message in done.stderr
    assert "must not be imported" not in done.stderr


def test_transformer_engine_needs_cuda(package):
    refuse_harmful_parts(cuda_available=False)
    package("transformer_engine/__init__.py")
    assert transformer_engine_problem(cuda_available=True) is None
    with pytest.raises(UserError, match="Transformer Engine without a CUDA device; pip uninstall"):
        refuse_harmful_parts(cuda_available=False)
