"""Errors of the user's become one line that any terminal may get."""

from __future__ import annotations

import errno

import pytest

from l2p_lowvram.user_input import InputError, describe_os_error, one_line, user_input


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a file\n  of\ttwo lines", "a file of two lines"),
        ("größe 猫 🙂 'quoted'", "größe 猫 🙂 'quoted'"),
        ("\x1b]0;title\x07\x9b2J", r"\x1b]0;title\x07\x9b2J"),
        ("left\u202eright \udcff", r"left\u202eright \udcff"),
    ],
)
def test_one_line_is_printable_and_keeps_every_alphabet(text: str, told: str) -> None:
    assert one_line(ValueError(text)) == told


def test_names_of_files_in_errors_of_the_system_are_printable_too() -> None:
    error = OSError(errno.ENOENT, "No such file or directory", "\x1b[31mred")

    assert describe_os_error(error) == r"\x1b[31mred: no such file or directory"
    with pytest.raises(InputError) as raised, user_input():
        raise error
    assert str(raised.value).isprintable()
