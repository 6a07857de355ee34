"""The lock files, and what is written into them."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import lock
from scripts.lock import ROOT

FILES = {name: ROOT / f"constraints{name}.txt" for name in ("", "-quickstart", "-cpu", "-cuda")}
LOCKS = {name: lock.parse(path.read_text()) for name, path in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_line_of_a_lock_file_is_a_pinned_package_with_hashes(name):
    text = FILES[name].read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert lock.render(LOCKS[name], head.replace("# ", "").rstrip()) == text
    assert len(LOCKS[name]) == len(re.findall("^[a-z]", text, re.MULTILINE)) > 0
    assert all(version and hashes for version, hashes in LOCKS[name].values())


@pytest.mark.parametrize(("name", "extras"), [("", ["test"]), ("-quickstart", ["embedded", "plots"])])
def test_a_lock_file_has_all_that_its_extras_need_at_versions_they_allow(name, extras):
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    # an environment in which no editable install was made has no such package to ask
    asked = [text for text in lock.requirements(*extras) if text != lock.EDITABLE]
    assert "editables" in LOCKS[name]
    waiting, seen = [Requirement(text) for text in asked], set()
    assert set(own) <= {str(text) for text in lock.requirements(*extras)}
    while waiting:
        wanted = waiting.pop()
        wanted.name = canonicalize_name(wanted.name)
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        assert wanted.specifier.contains(LOCKS[name][wanted.name][0]), str(wanted)
        for extra in ("", *wanted.extras):
            further = map(Requirement, requires(wanted.name) or ())
            waiting += [one for one in further if one.marker is None or one.marker.evaluate({"extra": extra})]
    assert len(seen) > 50


def test_the_quickstart_takes_the_same_files_as_the_tests():
    assert LOCKS["-quickstart"].items() <= LOCKS[""].items()
    assert not LOCKS["-cuda"].keys() & LOCKS[""].keys()
    version, hashes = LOCKS["-cpu"]["torch"]
    assert version == f"{LOCKS['']['torch'][0]}+cpu" and hashes < LOCKS[""]["torch"][1]


def test_torch_may_be_any_build_of_its_version():
    builds = ("2.13.0+cpu", "a"), ("2.13.0", "b"), ("2.13.0+cu130", "c")
    here, index, before = ({"torch": (version, {digest})} for version, digest in builds)
    assert lock.with_torch(here, index, before, {}) == {"torch": ("2.13.0", {"a", "b", "c"})}
    assert lock.with_torch(here, {"torch": ("2.12.1", {"d"})}) == {"torch": ("2.13.0", {"a"})}


def test_a_package_without_a_hash_is_not_written():
    found = lock.parse("Some_thing==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\nother==2\n")
    assert found == {"some-thing": ("1.0", {"0" * 64}), "other": ("2", set())}
    with pytest.raises(ValueError, match="no file of other 2 has a hash"):
        lock.render(found, "")


@pytest.mark.parametrize("right", [True, False], ids=["its-hash", "another-hash"])
def test_pip_takes_a_package_of_a_lock_file_only_with_its_hash(tmp_path, right):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("thing.py", "")
        file.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        file.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("thing-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() if right else b"").hexdigest()
    (tmp_path / "lock.txt").write_text(lock.render({"thing": ("1.0", {digest})}, ""))
    pip = (
        "-m pip install --quiet --isolated --no-index --find-links . --target to --no-deps --require-hashes -r lock.txt"
    )
    done = subprocess.run([sys.executable, *pip.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "to" / "thing.py").exists() == (done.returncode == 0) == right
    assert right or "DO NOT MATCH THE HASHES" in done.stderr
