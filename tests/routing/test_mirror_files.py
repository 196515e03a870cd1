"""Record files of mirrored requests follow one another within their bounds."""

from __future__ import annotations

import json
from pathlib import Path

from twinjet.routing.mirror import RecordFiles


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_file_is_followed_by_another_and_the_oldest_goes(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path / "new", 100, 2)
    for number in range(12):
        files.write({"number": number, "text": "\u00e9" * 10})
    kept = _names(tmp_path / "new")
    assert len(kept) == 2
    assert all((tmp_path / "new" / name).stat().st_size <= 100 for name in kept)
    numbers = [
        json.loads(line)["number"] for n in kept for line in (tmp_path / "new" / n).read_text().splitlines()
    ]
    assert numbers == list(range(numbers[0], 12))


def test_a_record_larger_than_a_file_gets_one_of_its_own(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path, 10, 5)
    files.write({"a": "x" * 50})
    files.write({"b": "y" * 50})
    assert _names(tmp_path) == ["mirror-00000001.jsonl", "mirror-00000002.jsonl"]


def test_a_new_server_writes_to_a_new_file_and_leaves_others_alone(tmp_path: Path) -> None:
    (tmp_path / "mirror-notes.jsonl").write_text("mine")
    RecordFiles(tmp_path, 1000, 1).write({"a": 1})
    RecordFiles(tmp_path, 1000, 1).write({"b": 2})
    assert _names(tmp_path) == ["mirror-00000002.jsonl", "mirror-notes.jsonl"]
