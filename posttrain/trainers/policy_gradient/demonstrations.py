"""Demonstrations among rollouts: tokenised once, put in the place of a rollout where a prompt's gate says so."""

import torch
from datasets import Dataset
from torch import Tensor

from posttrain.data.rendering.ends import Closing
from posttrain.data.rendering.refusals import refusal
from posttrain.data.tokens import template_kwargs_of, tools_of
from posttrain.errors import DataError
from posttrain.log import get_logger
from posttrain.mechanisms import group_rewards
from posttrain.objectives import advantages
from posttrain.rewards.base import shorten
from posttrain.trainers.policy_gradient import reward_setup
from posttrain.trainers.policy_gradient.rollout_log import judged

COLUMN, IDS = "demonstration", "demonstration_ids"
_READ = ("prompt", COLUMN, "tools", "chat_template_kwargs")


def tokenise(dataset, tokenizer, args, name: str, stop_ids=()):
    """Add `demonstration_ids`: what the model is to say after the prompt, up to the token at which generation stops.

    `stop_ids`: at which the model's generation stops; without any, the chat template's own end of turn decides. Columns
    `tools` and `chat_template_kwargs` are the row's own.

    Raises:
        DataError: no `datasets.Dataset`, or one without `demonstration` column; a demonstration that is neither a text
            nor one message of the assistant; an empty or over-long one where the config says error; a chat template
            under which the prompt with its answer does not begin with the prompt, or, with `end_of_turn: require`,
            one that closes no turn.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is of type {type(dataset).__name__}; with a gate its demonstrations are read before training, "
            "from a datasets.Dataset. Load it whole (Dataset.from_list(rows)), or set `gamma: null`."
        )
    columns = dataset.column_names or []
    missing = [column for column in ("prompt", COLUMN) if column not in columns]
    if missing:
        raise DataError(
            f"{name} has no column {missing[0]!r}, which the gate for demonstrations needs. Found: "
            f"{', '.join(columns)}. Rename or add it, or set `gamma: null`."
        )
    closing = Closing(tokenizer, stop_ids)
    found = []
    for number, row in enumerate(dataset.select_columns([c for c in _READ if c in columns]), 1):
        kwargs = (args.chat_template_kwargs or {}) | template_kwargs_of(row)
        try:
            found.append(_ids(row["prompt"], row[COLUMN], tokenizer, kwargs, tools_of(row), closing))
        except DataError as error:
            raise DataError(f"{name}, row {number}: {error}") from None
    _check_closing(closing, args, name, len(found))
    rows = dataset.remove_columns([IDS] if IDS in columns else []).add_column(IDS, found)
    lengths = [len(ids) for ids in rows[IDS]]
    empty = [number for number, length in enumerate(lengths, 1) if not length]
    if empty and args.empty_demonstrations == "error":
        raise DataError(
            f"{len(empty)} of {len(lengths)} demonstrations of {name} are empty, the first in row {empty[0]}. Fill or "
            "drop them, or set `empty_demonstrations: rollouts`, which leaves such prompts to their rollouts."
        )
    if empty:
        get_logger().warning(
            "%d of %d demonstrations of %s are empty; these prompts keep their rollouts", len(empty), len(rows), name
        )
    limit = args.max_completion_length
    long = [number for number, length in enumerate(lengths, 1) if length > limit]
    if long and args.long_demonstrations == "error":
        raise DataError(
            f"{len(long)} of {len(lengths)} demonstrations of {name} are longer than max_completion_length ({limit} "
            f"tokens), the first in row {long[0]} ({lengths[long[0] - 1]} tokens). Set max_completion_length to "
            f"{max(lengths)}, or `long_demonstrations: truncate`, which cuts them before their end."
        )
    if long:
        get_logger().warning(
            "%d of %d demonstrations of %s are cut to %d tokens, without their end", len(long), len(rows), name, limit
        )
        rows = rows.map(lambda row: {IDS: row[IDS][:limit]}, desc=f"Cutting demonstrations of {name}")
    return rows


def _check_closing(closing: Closing, args, name: str, rows: int) -> None:
    """Say, or with `end_of_turn: require` refuse, that the template ends no turn where generation stops."""
    eos = closing.tokenizer.eos_token
    if closing.unclosed:
        fault = (
            f"{name}: the chat template closes no turn, so {closing.unclosed} of {rows} demonstrations end with the "
            f"tokenizer's {eos!r}"
        )
        if args.end_of_turn == "require" and closing.unclosed > rows / 2:
            raise DataError(
                f"{fault}, and end_of_turn is require. Use the template of the model's instruct version, or set "
                "`end_of_turn: warn`."
            )
        get_logger().warning("%s", fault)
    if closing.unstopped:
        get_logger().warning(
            "%s: generation does not stop at the demonstrations' end of turn, so %d of %d demonstrations get %r behind "
            "it. Put it into `model.generation_config.eos_token_id`.", name, closing.unstopped, rows, eos,
        )  # fmt: skip


def _ids(prompt, demonstration, tokenizer, template_kwargs: dict, tools=None, closing: Closing | None = None):
    answer, calls = _answer(demonstration), _calls(demonstration)
    if not answer.strip() and not calls:
        return []
    closing = closing or Closing(tokenizer)
    if isinstance(prompt, str):
        if not isinstance(demonstration, str):
            raise DataError("a prompt is text and its demonstration is not; give both as text, or both as messages.")
        return closing.text(tokenizer(demonstration, add_special_tokens=False)["input_ids"])
    turns = [{"role": "assistant", "content": answer}] if isinstance(demonstration, str) else demonstration
    kwargs = {"tools": tools, "tokenize": True, "return_dict": True, **template_kwargs}
    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        whole = tokenizer.apply_chat_template([*prompt, *turns], **kwargs)["input_ids"]
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        said = refusal(error, [[*prompt, *turns]], lambda messages: tokenizer.apply_chat_template(messages, **kwargs))
        raise DataError(said) from error
    if whole[: len(before)] != before:
        raise DataError(
            "the chat template changes the prompt once an answer follows it, so the answer's tokens cannot be told "
            "apart. Give prompt and demonstration as text with the template applied."
        )
    return closing.messages(whole[len(before) :], prompt, tools, template_kwargs, turns[0] if calls else None)


def _calls(demonstration) -> list | None:
    """The tool calls of a demonstration; None where it makes none."""
    turn = demonstration[-1] if isinstance(demonstration, list) and demonstration else None
    return (turn.get("tool_calls") or None) if isinstance(turn, dict) else None


def _answer(demonstration) -> str:
    """The text of a demonstration, empty where there is none."""
    if not demonstration:
        return ""
    if isinstance(demonstration, str):
        return demonstration
    turns = demonstration if isinstance(demonstration, list) else []
    if len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("role") == "assistant":
        content = turns[0].get("content")
        if content is None or isinstance(content, str):
            return content or ""
    raise DataError(
        f"the demonstration is {shorten(demonstration)}; it must be a text, or a list of one message of the assistant "
        "whose content is a text (no images, no turns of others)."
    )


def gate_weights(rewards: Tensor, gate: Tensor | None, soft_gate: list | None, threshold: float) -> Tensor:
    """(P, 3) weights of each prompt's rollouts, off-policy demonstration and SFT demonstration.

    Args:
        rewards: (P, G) that success is read from, NaN where unscorable.
        gate: (P,) True where the demonstration takes the rollouts' place; None with a `soft_gate`.
        soft_gate: G + 1 rows of weights by the number of successes.
        threshold: the least reward of a success.
    """
    if soft_gate is not None:
        table = torch.tensor(soft_gate, dtype=torch.float32, device=rewards.device)
        return table[(rewards >= threshold).sum(dim=1)]
    weights = torch.zeros(len(rewards), 3, device=rewards.device)
    weights[:, 0], weights[:, 2] = (~gate).float(), gate.float()
    return weights


def row_advantage(normalization: str, coefficient: float, loss_type: str, length: Tensor, totals: dict) -> Tensor:
    """The advantages that give demonstrations of `length` tokens (D,) the weight that `normalization` asks for.

    Args:
        normalization, coefficient: as in `objectives.advantages.demonstration_advantage`, which is of dr_grpo.
        loss_type: TRL's; sets what a token of a row weighs.
        totals: of the generation batch over all ranks: rows, group_size, tokens (of the loss), demonstration_tokens,
            max_length (of a completion).
    """
    rows, max_length = totals["rows"], totals["max_length"]
    wanted = advantages.demonstration_advantage(
        normalization,
        coefficient,
        group_size=totals["group_size"],
        max_length=max_length,
        demo_tokens=length,
        total_rows=rows,
        total_demo_tokens=totals["demonstration_tokens"],
    )
    if normalization == "unified" or loss_type == "dr_grpo":
        return wanted * torch.ones_like(length)
    divisor = {"grpo": rows * length, "sapo": rows * length, "luspo": rows}.get(loss_type, totals["tokens"])
    return wanted * divisor / (rows * max_length) * torch.ones_like(length)


def place(batch: dict, rows: list[int], demonstrations: list[list[int]], pad: int) -> None:
    """Put demonstrations in the place of the completions of `rows`, widening the batch where they are longer."""
    if not rows:
        return
    gap = max(len(ids) for ids in demonstrations) - batch["completion_ids"].size(1)
    if gap > 0:
        width = batch["completion_ids"].size(1)
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.size(1) == width and "prompt" not in key:
                fill = pad if key == "completion_ids" else 1 if key in ("tool_mask", "importance_sampling_ratio") else 0
                batch[key] = torch.nn.functional.pad(value, (0, gap), value=fill)
    for row, ids in zip(rows, demonstrations, strict=True):
        batch["completion_ids"][row] = pad
        batch["completion_ids"][row, : len(ids)] = torch.tensor(ids, device=batch["completion_ids"].device)
        batch["completion_mask"][row] = 0
        batch["completion_mask"][row, : len(ids)] = 1
        for key, neutral in (("tool_mask", 1), ("importance_sampling_ratio", 1.0), ("old_per_token_logps", 0.0)):
            if key in batch:
                batch[key][row] = neutral


def insert(trainer, batch: dict, inputs: list[dict], rewards: Tensor, size: int) -> None:
    """Put demonstrations into a scored batch where the gates of their prompts say so.

    Args:
        batch: this rank's rollouts with their advantages; changed in place. `demonstrations` (B,) flags the rows that
            are demonstrations now, `off_policy_share` (B,) the part of their advantage that is off-policy.
        inputs: this rank's examples, with `demonstration_ids`.
        rewards: (N,) of all ranks' rollouts, NaN where unscorable.
        size: rollouts a prompt.
    """
    args, device, own = trainer.args, rewards.device, len(inputs)
    start = trainer.accelerator.process_index * own
    scores = judged(trainer, rewards).view(-1, size)
    reward_setup.check_success(args, scores)
    gate = None
    if args.soft_gate is None:
        gate = advantages.success_gate(scores, args.gamma, args.least_success)
    weights = gate_weights(scores, gate, args.soft_gate, args.least_success)
    lengths = torch.tensor([len(row[IDS]) for row in inputs], device=device)
    lengths = trainer.accelerator.gather(lengths).view(-1, size)[:, 0].float()
    # a prompt without a demonstration stays with its rollouts
    weights[lengths == 0] = torch.tensor([1.0, 0.0, 0.0], device=device)
    on_policy, off_policy, sft = weights.unbind(dim=1)
    demonstrated = (off_policy > 0) | (sft > 0)

    values = trainer.accelerator.gather(batch["advantages"])
    if (off_policy > 0).any():
        # an off-policy demonstration belongs to the group that it is compared with
        filled = rewards.view(-1, size).clone()
        filled[off_policy > 0, 0] = args.least_success
        values = group_rewards.group_advantages(
            filled.view(-1), size, trainer.group_advantage, f"advantage {args.advantage}"
        )
    values = values.view(-1, size)
    off_policy = off_policy * values[:, 0]
    values = values * on_policy[:, None]

    group_of = torch.arange(start, start + own, device=device) // size
    batch["completion_mask"][on_policy[group_of] == 0] = 0
    rows = [i for i in range(own) if (start + i) % size == 0 and demonstrated[(start + i) // size]]
    place(batch, rows, [inputs[i][IDS] for i in rows], trainer._tokenizer.pad_token_id)
    loss_mask = batch["completion_mask"]
    if "tool_mask" in batch:
        loss_mask = loss_mask * batch["tool_mask"]
    batch["num_items_in_batch"] = trainer.accelerator.gather(loss_mask.sum()).sum()
    totals = {
        "rows": len(rewards),
        "group_size": size,
        "tokens": batch["num_items_in_batch"].item(),
        "demonstration_tokens": max(lengths[demonstrated].sum().item(), 1.0),
        "max_length": trainer.max_completion_length,
    }
    one = row_advantage(args.sft_normalization, args.sft_coef, trainer.loss_type, lengths.clamp(min=1), totals)
    whole = sft * one + off_policy
    values[demonstrated, 0] = whole[demonstrated]
    trainer.set_advantages(batch, values.reshape(-1))
    flags = torch.zeros(own, dtype=torch.bool, device=device)
    flags[rows] = True
    batch["demonstrations"] = flags
    batch["off_policy_share"] = flags * torch.nan_to_num(off_policy / whole)[group_of]

    metrics = trainer._metrics["train"]
    successes = (scores >= args.least_success).sum(dim=1)
    metrics["hpt/frac_sft_prompts"].append((on_policy == 0).float().mean().item())
    metrics["hpt/success_rate"].append((successes.float() / size).mean().item())
    metrics["hpt/solve_none"].append((successes == 0).float().mean().item())
    metrics["hpt/solve_all"].append((successes == size).float().mean().item())
    metrics["hpt/demo_tokens"].append(lengths[demonstrated].sum().item())
