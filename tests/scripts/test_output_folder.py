"""What a call writes takes the place of what an earlier one wrote, and of nothing else."""

from __future__ import annotations

import pytest

from trainers.inference.picture_files import MARK, output_folder


def draw(folder, *names, reads=()):
    with output_folder(folder, reads) as made:
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(f"drawn {name}")


def draw_and_interrupt(folder, name):
    with output_folder(folder) as made:
        (made / name).touch()
        raise KeyboardInterrupt


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MARK}


def test_an_earlier_calls_files_are_replaced_and_no_others(tmp_path):
    folder = tmp_path / "deep" / "out"
    draw(folder, "a.png", "cat/0.png", "dog/0.png", "settings.json")
    (folder / "mine.txt").write_text("mine")
    (folder / "dog" / "mine.txt").write_text("mine")
    draw(folder, "b.png", "dog/1.png")
    assert files(folder) == {"b.png", "dog/1.png", "mine.txt", "dog/mine.txt"}
    assert not (folder / "cat").exists()
    assert {path.name for path in folder.parent.iterdir()} == {"out"}  # nothing is left beside it


def test_after_an_error_what_is_there_stays(tmp_path):
    draw(tmp_path / "out", "a.png", "b.png")
    with pytest.raises(RuntimeError, match="before"), output_folder(tmp_path / "out"):
        raise RuntimeError("before anything is drawn")
    assert files(tmp_path / "out") == {"a.png", "b.png"}
    with pytest.raises(KeyboardInterrupt):
        draw_and_interrupt(tmp_path / "out", "b.png")
    assert files(tmp_path / "out") == {"b.png"}  # what was drawn until then
    draw(tmp_path / "out", "c.png")
    assert files(tmp_path / "out") == {"c.png"}


@pytest.mark.parametrize("mark", [None, '{"editor": 1}', "[", '{"drawn": 3}'])
def test_folders_of_others_are_refused(tmp_path, mark):
    (tmp_path / "out" / "src").mkdir(parents=True)
    (tmp_path / "out" / "src" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "settings.json").write_text("{}")
    if mark:
        (tmp_path / "out" / MARK).write_text(mark)
    with pytest.raises(ValueError, match="--output-dir .*out: holds other files; choose a new folder"):
        draw(tmp_path / "out", "a.png")
    assert files(tmp_path / "out") == {"src/thesis.txt", "settings.json"}
    with pytest.raises(ValueError, match="holds other files"):
        draw(tmp_path / "out" / "settings.json", "a.png")


def test_names_that_lead_out_are_left_alone(tmp_path):
    draw(tmp_path / "out", "a.png")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out" / MARK).write_text(f'{{"drawn": ["../mine.txt", "{tmp_path}/mine.txt", "a.png"]}}')
    draw(tmp_path / "out", "b.png")
    assert files(tmp_path / "out") == {"b.png"}
    assert (tmp_path / "mine.txt").exists()


def test_what_is_read_must_lie_elsewhere(tmp_path):
    draw(tmp_path / "out", "a.png")
    with pytest.raises(ValueError, match="--output-dir .*out: .*a.png is read and lies there; choose another folder"):
        draw(tmp_path / "out", "b.png", reads=[tmp_path / "elsewhere", tmp_path / "out" / "a.png"])
    assert files(tmp_path / "out") == {"a.png"}
