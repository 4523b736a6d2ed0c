"""What must hold of new files and folders: whole or not there, and refused before work begins where they cannot be."""

import errno
import os
from pathlib import Path

import pytest

from slm_jax.errors import InputError
from slm_jax.files import check_new_file, check_new_folder, new_folder, replace_text, user_path, write_file


def fill(target, between=lambda: None):
    """Make a folder with one file; something happens before it is done."""
    with new_folder(target) as partial:
        (partial / "file").write_text("ours")
        between()


def refusal(target):
    """The same from both; nothing may have been made."""
    with pytest.raises(InputError) as early:
        check_new_folder(target)
    with pytest.raises(InputError) as late:
        fill(target, lambda: pytest.fail("it began to write"))
    assert str(early.value) == str(late.value)
    assert "\n" not in str(early.value)
    return str(early.value)


def test_a_path_is_what_it_says_and_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/x@best") == tmp_path / "runs" / "x@best"
    assert user_path(Path("a/b")) == Path("a/b")
    (tmp_path / "file").touch()
    assert user_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"
    (tmp_path / "dangling").symlink_to("nowhere")
    assert user_path(tmp_path / "dangling") == tmp_path / "dangling"


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a\0b", "loop", "loop/x", "x" * 300])
def test_what_can_be_no_path_is_said(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError) as caught:
        user_path(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert repr(text) in refusal(text)


def test_a_folder_becomes_the_target_when_all_went_well(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("linked")
    for name in ("new", "a/b/c", "empty", "link", "long" * 60):
        with new_folder(tmp_path / name) as partial:
            (partial / "file").write_text(name)
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == name
    assert (tmp_path / "linked" / "file").is_file()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), InputError("no"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_failed_and_an_empty_target_stays(error, tmp_path):
    (tmp_path / "empty").mkdir()

    def fail():
        raise error

    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        fill(tmp_path / "empty", fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_what_came_to_be_in_the_meantime_is_left_alone(tmp_path):
    def another():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(InputError, match="cannot be written"):
        fill(tmp_path / "out", another)
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    for name in ("file", "used"):
        assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: exists")
    assert "no folder" in refusal(tmp_path / "file" / "below" / "it")


def test_a_target_that_is_no_place_for_a_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for target in (".", "", "../empty", tmp_path / "empty"):
        assert "is the current folder" in refusal(target)
    assert "root of a file system" in refusal(Path(tmp_path.anchor))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_where_nothing_can_be_written_is_said_before_work_begins(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "can be written to" in refusal(tmp_path / "closed" / "new")


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "a", "a folder is there")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "b", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_text_without_a_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a file in it"):
        replace_text(Path(name), "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_with_its_folder_and_through_a_link(tmp_path):
    write_file(check_new_file(tmp_path / "new" / "a.json", "out", "b.json"), "one")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "a.json")
    write_file(check_new_file(tmp_path / "link", "out", "b.json"), "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new" / "a.json").read_text() == "two"
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("", "plot is ''; expected a file, such as b.png"),
        (".", "plot is '.'; expected a file, such as b.png"),
        ("/dev/null", "plot is '/dev/null'; expected a file"),
        ("file/b.png", "cannot write there .*file.; choose another place with --plot"),
        ("link.png", "cannot write there .*file.; choose another place with --plot"),
        ("~nouser/b.png", "cannot be used as a path"),
    ],
)
def test_where_no_file_can_be_is_said_before_work_begins(target, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link.png").symlink_to("file/b.png")
    with pytest.raises(InputError, match=said):
        check_new_file(target, "plot", "b.png")


def test_only_a_full_disk_is_said_to_be_full(tmp_path):
    for number, said in (
        (errno.ENOSPC, "; free space there or choose another folder"),
        (errno.EROFS, "; choose another"),
    ):
        with pytest.raises(InputError, match=f"cannot be written: .*{said}"), new_folder(tmp_path / "new"):
            raise OSError(number, os.strerror(number))
