"""The saved form of adapters that begin with a part of the base."""

from posttrain.mechanisms import initial_adapter


def test_the_references_folder_goes_and_what_else_lies_in_it_stays(tmp_path):
    for name in ("clean", "shared"):
        reference = tmp_path / name / initial_adapter.REFERENCE
        reference.mkdir(parents=True)
        for file in (initial_adapter.CONFIG, initial_adapter.WEIGHTS):
            (reference / file).write_text("{}")
    (tmp_path / "shared" / "ref" / "notes.txt").write_text("mine")
    for name in ("clean", "shared", "empty"):
        initial_adapter.remove_reference(tmp_path / name)
    assert not (tmp_path / "clean" / "ref").exists()
    assert [path.name for path in (tmp_path / "shared" / "ref").iterdir()] == ["notes.txt"]
