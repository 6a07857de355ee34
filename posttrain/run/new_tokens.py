"""Special tokens of the rows whose embedding nobody has trained, nor will: new ones under an adapter."""

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from posttrain.data.processing import tokenizer_of
from posttrain.log import get_logger

# Rows that are looked at for the mean of an embedding, and the share of their usual distance from it within which a row
# counts as that mean
_SAMPLE = 4096
_NEAR = 0.1


def at_their_start(weight: Tensor, ids: list[int]) -> list[int]:
    """Return those rows `ids` of an embedding (V, d) that are its mean, where `resize_token_embeddings` starts.

    A row of zeros, as padding has it, is none of them.
    """
    step = max(len(weight) // _SAMPLE, 1)
    sample = weight[::step].float()
    mean = sample.mean(dim=0)
    usual = (sample - mean).norm(dim=1).median()
    rows = weight[torch.tensor(ids, device=weight.device)].float()
    start = (rows.norm(dim=1) > 0) & ((rows - mean).norm(dim=1) < _NEAR * usual)
    return [index for index, is_start in zip(ids, start.tolist(), strict=True) if is_start]


def warn_of_absent(model, dataset, columns: tuple[str, ...], processing_class) -> None:
    """Warn of tokens that the adapter is to train and no row holds; under a tied head they train as wrong answers."""
    if not is_peft_model(model) or not hasattr(dataset, "__len__"):
        return
    if model.get_base_model().config.get_text_config().tie_word_embeddings:
        return
    config = model.active_peft_config
    wanted = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    if isinstance(wanted, dict):
        wanted = [index for name, indices in wanted.items() if "head" not in name for index in indices]
    absent = sorted(set(wanted) - _ids(dataset, columns)) if wanted else []
    if absent:
        names = ", ".join(map(repr, tokenizer_of(processing_class).convert_ids_to_tokens(absent[:5])))
        get_logger().warning(
            "train_dataset: %d of the %d tokens that the adapter is to train are in no row, so their embeddings stay "
            "as they are: %s%s. Mend the token indices, or leave these out.",
            len(absent), len(set(wanted)), names, " and others" * (len(absent) > 5),
        )  # fmt: skip


def warn_of_frozen(model, dataset, columns: tuple[str, ...], processing_class) -> None:
    """Warn of special tokens in the rows whose embedding is where new ones start, and frozen under the adapter."""
    if not is_peft_model(model) or not hasattr(dataset, "__len__"):
        return
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if type(embedding) is not torch.nn.Embedding or weight.requires_grad or hasattr(weight, "ds_shape"):
        return
    tokenizer = tokenizer_of(processing_class)
    added = {index for index in tokenizer.get_added_vocab().values() if index < len(weight)}
    ids = sorted(added & _ids(dataset, columns))
    new = at_their_start(weight.detach(), ids) if ids else []
    if new:
        names = ", ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(new[:5]))
        get_logger().warning(
            "train_dataset: the embedding of %s%s is where a new token's starts, and the adapter leaves it there, so "
            "they mean nothing to the model. Let the adapter train them (modules_to_save or trainable_token_indices of "
            "its config), or train the whole model first.", names, " and others" * (len(new) > 5),
        )  # fmt: skip


def _ids(dataset, columns: tuple[str, ...]) -> set[int]:
    import pyarrow.compute as pc

    found: set[int] = set()
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(1000):
        for column in columns:
            found.update(pc.unique(pc.list_flatten(table.column(column))).to_pylist())
    return found
