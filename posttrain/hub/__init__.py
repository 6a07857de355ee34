"""The model card of a run, and its way to the hub."""

from posttrain.hub.base_model import is_hub_id
from posttrain.hub.card import write_model_card
from posttrain.hub.files import clean_readme
from posttrain.hub.merging import merge_adapter
from posttrain.hub.passages import loading_lines
from posttrain.hub.push import push_checkpoint, push_folder, push_run
from posttrain.hub.repository import Destination, check_push, open_repository, preflight

__all__ = [
    "Destination",
    "check_push",
    "clean_readme",
    "is_hub_id",
    "loading_lines",
    "merge_adapter",
    "open_repository",
    "preflight",
    "push_checkpoint",
    "push_folder",
    "push_run",
    "write_model_card",
]
