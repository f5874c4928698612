import pytest

from ctseg.report.tables import render_table


def test_aligns_numbers_right_and_words_left() -> None:
    table = render_table(
        ["case", "mean_dice", "voxels"], [["spleen_10", 0.95123456, 12], ["a", None, 123456], ["b", 1.0, None]]
    )
    assert table == (
        "case       mean_dice  voxels\n"
        "---------  ---------  ------\n"
        "spleen_10     0.9512      12\n"
        "a                  -  123456\n"
        "b             1.0000       -"
    )


def test_no_rows_leave_the_header() -> None:
    assert render_table(["case", "dice"], []) == "case  dice\n----  ----"


def test_unknown_truth_and_mixed_columns_are_words() -> None:
    lines = render_table(["a", "b", "c"], [[None, True, 1], [None, False, "text"]]).splitlines()
    assert lines[2:] == ["-  True   1", "-  False  text"]


def test_no_line_ends_in_spaces() -> None:
    assert all(line == line.rstrip() for line in render_table(["a", "b"], [["x", "yy"], ["x", ""]]).splitlines())


def test_uneven_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        render_table(["a", "b"], [[1]])


def test_names_of_files_do_not_command_the_terminal() -> None:
    assert render_table(["name"], [["a\nb\x1b[31m"]]) == "name\n--------\na?b?[31m"
