"""What accelerate makes of the shipped launch files, on a machine of any size."""

import pytest
from accelerate.commands import launch

from posttrain.cli import train
from posttrain.paths import configs_dir

FOLDER = configs_dir() / "accelerate"
ON_CPUS = sorted(path.name for path in FOLDER.glob("cpu*.yaml"))


@pytest.fixture(autouse=True)
def heard(caplog):
    """A quiet command may have silenced accelerate in this process."""
    caplog.set_level("WARNING", logger=launch.logger.name)


def read(name, *flags):
    """The arguments of a launch, after accelerate has filled them up; its notices go to the log."""
    given = launch.launch_command_parser().parse_args(["--config_file", str(FOLDER / name), *flags, "recipe.py"])
    return launch._validate_launch_command(given)[0]


@pytest.mark.parametrize("cores", [1, 2, 16, 96])
@pytest.mark.parametrize("name", ON_CPUS)
def test_accelerate_has_nothing_to_announce(name, cores, monkeypatch, caplog):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: cores)
    read(name)
    assert not caplog.records


def test_a_launch_file_without_a_number_is_announced(tmp_path, monkeypatch, caplog):
    """So that the test above can fail."""
    text = (FOLDER / "cpu.yaml").read_text()
    (tmp_path / "cpu.yaml").write_text(text[: text.index("# Threads")])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16)
    read(tmp_path / "cpu.yaml")
    assert "num_cpu_threads_per_process" in caplog.text


@pytest.mark.parametrize(
    ("name", "threads", "cores", "flag"),
    [
        ("cpu.yaml", None, 16, "16"),
        ("cpu_ddp.yaml", None, 16, "8"),
        ("cpu_ddp.yaml", None, 1, "1"),
        ("cpu.yaml", "3", 16, "3"),
        ("cpu_zero3.yaml", None, 16, None),
        ("single_gpu.yaml", None, 16, None),
    ],
)
def test_the_command_takes_the_cores_there_are(name, threads, cores, flag, monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    given = train._threads(FOLDER / name)
    assert given == ([] if flag is None else ["--num_cpu_threads_per_process", flag])
    if flag:
        assert read(name, *given).num_cpu_threads_per_process == int(flag)
