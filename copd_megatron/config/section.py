"""Base of every config section: strict (unknown keys are errors), typed, documented field by field."""
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section. Unknown keys are refused; assignment is validated; field docstrings are shown
    by ``copd config``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True,
                              arbitrary_types_allowed=True, protected_namespaces=())
