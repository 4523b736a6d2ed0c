"""What must hold of new files and folders: complete or absent, and impossible places refused before work begins."""

import errno
from pathlib import Path

import pytest

from slm_jax.errors import InputError
from slm_jax.files import check_new_file, check_new_folder, new_folder, replace_text, user_path, write_file


def fill(target, between):
    """Make a folder with one file; something happens before it is done."""
    with new_folder(target) as partial:
        (partial / "file").write_text("ours")
        between()


def refusal(target):
    """The same line before and at the start of the work."""
    with pytest.raises(InputError) as early:
        check_new_folder(target)
    with pytest.raises(InputError) as late:
        fill(target, lambda: pytest.fail("it began to write"))
    assert str(early.value) == str(late.value)
    assert "\n" not in str(early.value)
    return str(early.value)


def test_a_path_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert user_path("~/runs/x@best") == tmp_path / "runs" / "x@best"
    for path in (Path("a/b"), tmp_path / "file" / "below", tmp_path / "dangling"):
        assert user_path(path) == path


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a\0b", "loop/x", "x" * 300])
def test_impossible_paths_are_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as caught:
        user_path(text)
    assert repr(text) in str(caught.value)
    assert repr(text) in refusal(text)


def test_a_complete_folder_becomes_the_target(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("linked")
    for name in ("new", "a/b/c", "empty", "link", "long" * 60):
        with new_folder(tmp_path / name) as partial:
            (partial / "file").write_text(name)
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == name
    assert (tmp_path / "linked" / "file").is_file()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), InputError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_but_an_empty_target(error, tmp_path):
    (tmp_path / "empty").mkdir()

    def fail():
        raise error

    expected, message = (
        (InputError, "cannot be written: No space") if isinstance(error, OSError) else (type(error), None)
    )
    with pytest.raises(expected, match=message):
        fill(tmp_path / "empty", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_folder_made_meanwhile_is_left_alone(tmp_path):
    def another():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(InputError, match="cannot be written"):
        fill(tmp_path / "out", another)
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_of_no_new_folder_are_refused(tmp_path, monkeypatch):
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    for name in ("file", "used/x"):
        (tmp_path / name).touch()
    for name in ("file", "used"):
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: exists")
    assert "not a writable folder" in refusal(tmp_path / "file" / "below" / "it")
    monkeypatch.chdir(tmp_path / "empty")
    for target in (".", "", "../empty", tmp_path / "empty", Path(tmp_path.anchor)):
        assert "current folder or the root" in refusal(target)


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "a", "a folder is there")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "b", "\ud800")
    for name in ("", ".", "/"):
        with pytest.raises(InputError, match="expected a file in it"):
            replace_text(Path(name), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_written_with_its_folder_and_through_a_link(tmp_path):
    write_file(check_new_file(tmp_path / "new" / "a.json", "out", "b.json"), "one")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "a.json")
    write_file(check_new_file(tmp_path / "link", "out", "b.json"), "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new" / "a.json").read_text() == "two"
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        *[(target, f"plot is '{target}'; expected a file, such as b.png") for target in ("", ".", "/dev/null")],
        *[(target, "file is not a writable folder") for target in ("file/b.png", "link.png")],
        ("~nouser/b.png", "cannot be used as a path"),
    ],
)
def test_places_of_no_new_file_are_refused(target, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link.png").symlink_to("file/b.png")
    with pytest.raises(InputError, match=expected):
        check_new_file(target, "plot", "b.png")
