"""`negengine bench report` as a user types it."""

import pytest
import samples
from typer.testing import CliRunner

from negengine.cli import app

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, ["bench", "report", *map(str, arguments)])


def test_a_page_and_a_table_are_written(tmp_path):
    files = [
        samples.written(tmp_path / "model.json", samples.models()),
        samples.written(tmp_path / "operator.json", samples.operator()),
    ]
    out = tmp_path / "deep" / "report"
    result = run(*files, "--output", out)
    assert result.exit_code == 0, result.output
    assert result.output.replace("\n", "") == f"{out / 'report.html'}{out / 'report.md'}"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md"]
    for name in ("report.html", "report.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>" if name.endswith("html") else "# ")
        assert "+1.1 %" in text
        assert "482.1 µs" in text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory"),
        ("no JSON", "is not JSON"),
        (samples.models(schema=0), "has schema 0; this version of negengine reads schema 1"),
        (samples.document("model", []), "has no rows"),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_is_written(tmp_path, content, message):
    good = samples.written(tmp_path / "operator.json", samples.operator())
    wrong = tmp_path / "model.json"
    if content is not None:
        samples.written(wrong, content)
    result = run(good, wrong, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {wrong}")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be(tmp_path):
    good = samples.written(tmp_path / "operator.json", samples.operator())
    result = run(good, "--output", good)
    assert result.exit_code == 2
    assert result.stderr == f"error: {good}: File exists\n"


def test_without_a_file_the_usage_is_told():
    assert run("--output", "out").exit_code == 2
    assert "report" in runner.invoke(app, ["bench", "--help"]).output
