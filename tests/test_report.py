"""Tables and pictures from run folders, whole, damaged or of another kind."""

import random
import shutil

import pytest
from small_runs import run

from bmsn_zoo import report
from bmsn_zoo.results import SearchResult

pytestmark = pytest.mark.timeout(200)


def test_both_kinds_of_runs_are_drawn_and_told(runs, capsys, tmp_path):
    folders = [shutil.copytree(getattr(runs, name), tmp_path / name) for name in ("search", "found", "default")]
    for folder in folders:
        shutil.rmtree(folder / "pictures")
    capsys.readouterr()
    assert run(report, *folders) == 0
    printed = capsys.readouterr().out
    assert printed.count("layouts, ranked by score-split accuracy") == 1
    assert printed.count("test accuracy ") == 2
    for folder, pictures in zip(folders, (3, 1, 1), strict=True):
        assert len(list((folder / "pictures").glob("*.png"))) == pictures
        for file in (folder / "pictures").iterdir():
            assert file.read_bytes() == (getattr(runs, folder.name) / "pictures" / file.name).read_bytes()


def test_a_search_without_an_assignment_has_no_picture_of_it(runs, capsys, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "search", ignore=shutil.ignore_patterns("pictures"))
    search = SearchResult.read(folder / "search.json")
    search.model_copy(update={"assignment_matrix": None, "scores": None}).write(folder / "search.json")
    assert run(report, folder) == 0
    assert sorted(file.name for file in (folder / "pictures").iterdir()) == ["accuracy_macs.png", "curves.png"]


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    assert "RUN_FOLDER" in capsys.readouterr().out


def damaged(content, rng):
    """Some bytes changed, cut, doubled or replaced by what a reader may trip over."""
    position = rng.randrange(len(content))
    junk = rng.choice([b"\xff", b"null", b"NaN", b"-1", b"1e999", b"[" * 5000, b"9" * 5000, b'"x"', b"\n", b""])
    length = rng.choice([0, 1, 5, 200, len(content)])
    return content[:position] + junk + content[position + length :]


@pytest.mark.parametrize("kind", ["search", "found"])
def test_a_damaged_run_ends_in_one_line_or_in_its_pictures(kind, runs, tmp_path, capsys):
    rng = random.Random(kind)
    result = "search.json" if kind == "search" else "metrics.json"
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(40):
        for name in (result, "metrics.jsonl"):
            shutil.copy(getattr(runs, kind) / name, folder)
        name = rng.choice([result, "metrics.jsonl", "metrics.jsonl"])
        (folder / name).write_bytes(damaged((folder / name).read_bytes(), rng))
        capsys.readouterr()
        code = run(report, folder)
        error = capsys.readouterr().err
        assert code in (0, 2)
        assert error.count("\n") == (1 if code else 0), error
        assert len(error) < 800


def test_folders_that_hold_no_run(runs, tmp_path, capsys):
    shutil.copy(runs.search / "search.json", tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "nothing", "holds no finished run"), (tmp_path / "empty", "holds no finished run"),
                         (tmp_path, "metrics.jsonl cannot be read")):  # fmt: skip
        capsys.readouterr()
        assert run(report, folder) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
