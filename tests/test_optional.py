"""Apex and Transformer Engine: told apart by their files, never imported."""

import pytest

from copd_megatron.optional import (
    apex_capabilities,
    apex_problem,
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


def test_transformer_engine_needs_cuda(package):
    refuse_harmful_parts(cuda_available=False)
    package("transformer_engine/__init__.py")
    assert transformer_engine_problem(cuda_available=True) is None
    with pytest.raises(UserError, match="Transformer Engine without a CUDA device; pip uninstall"):
        refuse_harmful_parts(cuda_available=False)
