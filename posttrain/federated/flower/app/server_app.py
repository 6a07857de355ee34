"""The app of the server: it leads the rounds, and saves a plain LoRA."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from posttrain.adapters.saved_lora import check_new
from posttrain.federated.adapter import SharedAdapter
from posttrain.federated.flower import FedSVD
from posttrain.federated.flower.settings import federated_config, listed_in
from posttrain.log import get_logger
from posttrain.mechanisms.base_digests import base_digests

from . import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    settings = context.run_config
    config = federated_config(settings)
    output = Path(settings["output"]).absolute()
    check_new(output / "adapter")
    model = task.adapted(settings)
    adapter = SharedAdapter(model, config)
    # another strategy goes here: FedMedian, FedTrimmedAvg, Krum, or a wrapper for central privacy around one
    strategy = FedSVD(
        FedAvg(min_train_nodes=1, min_available_nodes=1),
        adapter.start,
        listed_in(settings, "clients"),
        config,
        folder=output,
        base=base_digests(model),
    )
    shared = strategy.run(grid, wait=settings["connect-timeout"], resume=settings["resume"])
    adapter.save(output / "adapter", shared)
    get_logger().warning("the adapter of %d rounds is in %s", config.rounds, output / "adapter")
