"""The command: exit codes, help, and errors in plain words."""

import subprocess
import sys

import pytest

from convoxel import cli, runtime


@pytest.fixture
def failing(monkeypatch):
    """A command `fail` that raises what it is given."""

    def install(error):
        def run(_):
            raise error

        command = cli.Command("fail", "fail on purpose", lambda parser: None, run)
        monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, command))

    return install


@pytest.mark.parametrize("argv", [["--help"], *([command.name, "--help"] for command in cli.COMMANDS)])
def test_help_names_the_command_and_what_it_takes(argv, capsys):
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: convoxel")
    assert "--traceback" in text
    if argv == ["--help"]:
        assert all(command.name in text and command.summary in text for command in cli.COMMANDS)


def test_info_prints_what_info_returns(capsys):
    assert cli.main(["info"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{runtime.info()}\n"
    assert err == ""


def test_version(capsys):
    from convoxel import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"convoxel {__version__}\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--seed", "many"], "invalid int value: 'many'"),
        (["info", "brain.nii"], "unrecognized arguments: brain.nii"),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_2(argv, words, capsys):
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("labels must be in 0..3,\n  received 7"), "labels must be in 0..3, received 7"),
        (TypeError("expected a Volume"), "expected a Volume"),
        (FileNotFoundError(2, "No such file or directory", "a.nii"), "a.nii: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ImportError('pip install "convoxel[io]"'), 'pip install "convoxel[io]"'),
        (MemoryError(), "not enough memory"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_mistake_is_one_line_and_1(failing, error, line, capsys):
    failing(error)
    assert cli.main(["fail"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"convoxel fail: {line}\n")


@pytest.mark.parametrize("argv", [["--traceback", "fail"], ["fail", "--traceback"]])
def test_traceback_on_request(failing, argv, capsys):
    failing(ValueError("wrong"))
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("ValueError: wrong\n")


def test_traceback_from_the_environment(failing, capsys, monkeypatch):
    monkeypatch.setenv("CONVOXEL_TRACEBACK", "1")
    failing(ValueError("wrong"))
    assert cli.main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(failing):
    failing(RuntimeError("a promise was broken"))
    with pytest.raises(RuntimeError, match="a promise was broken"):
        cli.main(["fail"])


def test_stopped_by_the_user(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "convoxel: stopped\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--epochs", "0"], "epochs must be at least 1, received 0"),
        (["--threads", "-1"], "threads must be at least 1, received -1"),
    ],
)
def test_demo_refuses_numbers_that_train_nothing(argv, words, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *argv]) == 1
    assert capsys.readouterr().err == f"convoxel demo: {words}\n"
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    taken = tmp_path / "out"
    taken.write_text("")
    assert cli.main(["demo", "--quick", "--out", str(taken)]) == 1
    assert capsys.readouterr().err == f"convoxel demo: {taken}: File exists\n"


def test_python_m_convoxel():
    done = subprocess.run([sys.executable, "-m", "convoxel", "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"{runtime.info()}\n"
