"""Rows as `trl.SFTTrainer` turns them into tokens and labels, before a model is there and with nothing cut."""

from collections.abc import Sequence
from types import SimpleNamespace

from posttrain.data.processing import tokenizer_of
from posttrain.data.tokens import as_learned, as_rendered
from posttrain.errors import DataError


def tokenised_before_loading(args) -> bool:
    """Return whether rows can be tokenised before the model loads: no chat_template_path, no eos_token."""
    return args.chat_template_path is None and args.eos_token is None


def as_trained(
    dataset, processing_class, args, name: str, completion_only: bool, assistant_only: bool = False, template=None
):
    """Return a data set with the columns input_ids and labels beside the others.

    Args:
        dataset: a `datasets.Dataset` of prompt with completion, messages or texts.
        args: an SFTConfig. name: of the data set, for errors.
        completion_only, assistant_only: leave the prompt, or all but the assistant's tokens, out of the labels.
        template: of the chat, in the place of the tokenizer's own.

    Raises DataError for what cannot be rendered.
    """
    from trl import SFTTrainer

    # the method reads no more of the trainer
    trainer = SimpleNamespace(
        _tokenizer=tokenizer_of(processing_class), chat_template=template, completion_only_loss=completion_only
    )
    plain = SimpleNamespace(
        dataset_num_proc=args.dataset_num_proc,
        dataset_text_field=args.dataset_text_field,
        assistant_only_loss=assistant_only,
        max_length=None,
        shuffle_dataset=False,
    )
    try:
        dataset = as_rendered(dataset, processing_class)
        dataset = SFTTrainer._prepare_dataset(trainer, dataset, processing_class, plain, False, None, name)
        return as_learned(dataset, processing_class, name)
    except DataError:
        raise
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        raise DataError(f"{name}: a row cannot be turned into tokens: {type(error).__name__}: {error}") from error


def learned_ends(labels: Sequence[int]) -> tuple[int, int]:
    """Return where the tokens that are learned begin, and where they end; the row's length twice where none is."""
    first = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    last = next((i for i in range(len(labels), first, -1) if labels[i - 1] != -100), len(labels))
    return first, last
