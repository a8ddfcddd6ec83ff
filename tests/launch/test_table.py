"""Text tables."""

from copd_megatron.launch.table import format_table


def test_columns_line_up():
    assert format_table(["a", "bb"], [["xxx", "1"], ["y", ""]]) == "a    bb\n---  --\nxxx  1\ny"
