import pytest

from rwkvpeft.cli.guard import guarded
from rwkvpeft.errors import UserError


def fail_with(error):
    def body():
        raise error

    return body


def test_a_body_gives_its_own_exit_code():
    assert guarded(lambda: 0) == 0


def test_a_user_error_is_one_message_and_code_2(capsys):
    code = guarded(fail_with(UserError("no such file", found="a.pth", fix="--load_model b.pth")))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err == "error: no such file\n  found     a.pth\n  try       --load_model b.pth\n"


def test_debug_shows_the_traceback(capsys):
    code = guarded(fail_with(UserError("no such file")), debug=True)
    errors = capsys.readouterr().err
    assert code == 2
    assert "Traceback" in errors
    assert "no such file" in errors


def test_a_requirement_that_is_not_installed_is_one_message_and_code_2(capsys):
    assert guarded(fail_with(ModuleNotFoundError("No module named 'torch'", name="torch"))) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: torch is not installed")
    assert "pip install -e ." in errors


def test_another_module_that_is_missing_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError):
        guarded(fail_with(ModuleNotFoundError("No module named 'rwkvpeft.x'", name="rwkvpeft.x")))


def test_an_interrupt_gives_130():
    assert guarded(fail_with(KeyboardInterrupt())) == 130


def test_a_closed_pipe_is_quiet(capsys):
    assert guarded(fail_with(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(fail_with(ZeroDivisionError()))


def test_a_file_that_the_system_refuses_is_one_message_and_code_2(capsys, tmp_path):
    assert guarded(lambda: (tmp_path / ("n" * 300)).stat()) == 2
    assert "File name too long" in capsys.readouterr().err
