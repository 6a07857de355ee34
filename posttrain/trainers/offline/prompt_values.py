"""Values of prompts by a head on the frozen model's states: trained, saved, found again, and what they are worth."""

import inspect
import json
import math

import torch
import xxhash
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset

from posttrain.data.scored import baselines, scales, scoring
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.mechanisms import value_head
from posttrain.mechanisms.special_tokens import KeptTokens
from posttrain.rewards import get_rewards
from posttrain.run import checks
from posttrain.run.reference import batches_of, frozen
from posttrain.trainers.offline import reference_logps


def of_head(trainer, dataset, rewards: list[float], name: str) -> list[float]:
    """Return the value of each tokenised row's prompt, by the value heads.

    Of training prompts it comes from the head of their fold, which saw none of its answers' rewards; of others it is
    the mean over all heads.
    """
    keys = baselines.prompt_keys(dataset)
    distinct = list(dict.fromkeys(keys))
    prompts = _prompts(dataset, keys, name)
    if name == "train_dataset":
        folds = value_head.folds_of(distinct, trainer.args.value_folds)
        trainer.value_fold = dict(zip(distinct, folds, strict=True))
        trainer.value_heads = _heads(trainer, distinct, prompts, _means(keys, distinct, rewards), dataset, keys)
    predicted = _predict(trainer, distinct, prompts)
    values = [predicted[key] for key in keys]
    _log_quality(values, rewards, name)
    return values


def _means(keys: list[str], distinct: list[str], rewards: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the rewards of each distinct prompt; returns the means and the numbers of answers."""
    mean_of = dict(zip(keys, baselines.mean_per_prompt(keys, rewards), strict=True))
    counts = dict.fromkeys(distinct, 0)
    for key in keys:
        counts[key] += 1
    return torch.tensor([mean_of[key] for key in distinct]), torch.tensor([counts[key] for key in distinct]).float()


def _prompts(dataset, keys: list[str], name: str) -> dict[str, list[int]]:
    """Return the tokens of each distinct prompt."""
    found: dict[str, list[int]] = {}
    for number, (key, row) in enumerate(zip(keys, dataset.select_columns(["input_ids", "labels"]), strict=True), 1):
        if key in found:
            continue
        answer = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
        if answer == 0:
            raise DataError(
                f"{name}, answer {number}: the prompt is empty, and value: head reads the prompt. Give it a prompt, or "
                "use another value."
            )
        found[key] = row["input_ids"][:answer]
    return found


def _heads(trainer, distinct, prompts: dict, targets: tuple, dataset, keys) -> list[value_head.ValueHead]:
    """Train a value head for each fold, or load those in the run's folder that were trained on the same."""
    args, device = trainer.args, trainer.accelerator.device
    if trainer.reference_key is None:
        trainer.reference_key = reference_logps._reference_key(trainer)
    key = trainer.value_head_key = _key(trainer, distinct, prompts, targets)
    folder = args.value_head_dir or args.output_dir
    # Ranks may not share a disk: rank 0 looks, all follow
    main = trainer.accelerator.is_main_process
    found = value_head.load(folder, key, device) if main else None
    there = [found is not None]
    broadcast_object_list(there, from_process=0)
    if there[0]:
        get_logger().info("value heads reused from %s", folder)
        return _shared(trainer, found)
    rewards, counts = targets
    chosen = _sample(len(distinct), args.value_prompts, args.seed)
    if args.value_targets == "generations":
        asked = dict(zip(reversed(keys), reversed(dataset["prompt"][:]), strict=True))
        rewards, counts = rewards.clone(), torch.ones_like(counts)
        own = _rewards_of_generations(trainer, [(asked[distinct[i]], prompts[distinct[i]]) for i in chosen])
        rewards[torch.tensor(chosen)] = torch.tensor(own)
    states = _states(trainer, [prompts[distinct[i]] for i in chosen], "Value head: states")
    folds = [trainer.value_fold[distinct[i]] for i in chosen]
    if len(set(folds)) == 1:
        raise ConfigError(
            f"value_prompts is {args.value_prompts}, and all of those drawn lie in one fold. Raise it, to 100 and more."
        )
    accelerator, rows = trainer.accelerator, torch.tensor(chosen)
    own, states = {}, value_head.on_device(states, device)
    # each rank trains some, so that none waits for all
    for fold in range(accelerator.process_index, args.value_folds, accelerator.num_processes):
        others = torch.tensor([j for j, number in enumerate(folds) if number != fold])
        own[fold] = value_head.fit(
            [states[j] for j in others.tolist()],
            rewards[rows[others]],
            counts[rows[others]],
            args.reward_max,
            args.value_epochs,
            args.value_learning_rate,
            args.seed + fold,
            device,
        )
    trained = _gathered(trainer, own)
    if main:
        path = value_head.save(trained, folder, key)
        get_logger().info("%d value heads trained on %d prompts, saved as %s", len(trained), len(chosen), path)
    return trained


def _gathered(trainer, own: dict[int, value_head.ValueHead]) -> list[value_head.ValueHead]:
    """Return the heads of all folds, of which each rank has trained its own; every rank calls it."""
    if trainer.accelerator.num_processes == 1:
        return list(own.values())
    parts = [(fold, head.query.size(-1), _on_cpu(head)) for fold, head in own.items()]
    return [_made(trainer, size, state) for _, size, state in sorted(gather_object(parts), key=lambda part: part[0])]


def _shared(trainer, heads: list | None) -> list[value_head.ValueHead]:
    """Broadcast the main rank's heads to every rank."""
    if trainer.accelerator.num_processes == 1:
        return heads
    states = [None if heads is None else [(head.query.size(-1), _on_cpu(head)) for head in heads]]
    broadcast_object_list(states, from_process=0)
    return [_made(trainer, *one) for one in states[0]]


def _on_cpu(head) -> dict:
    return {name: value.cpu() for name, value in head.state_dict().items()}


def _made(trainer, hidden_size: int, state: dict) -> value_head.ValueHead:
    head = value_head.ValueHead(hidden_size, trainer.args.reward_max)
    head.load_state_dict(state)
    return head.to(trainer.accelerator.device).eval()


def _sample(number: int, most: int, seed: int) -> list[int]:
    if number <= most:
        return list(range(number))
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:most].tolist())


def _states(trainer, prompts: list[list[int]], what: str) -> list[torch.Tensor]:
    """Compute the frozen model's last hidden states of each prompt, (T, hidden_size) on the CPU, on every rank."""
    accelerator, found = trainer.accelerator, []
    for states, mask in _hidden(trainer, prompts, what):
        states = accelerator.pad_across_processes(states, dim=1)
        mask = accelerator.pad_across_processes(mask.to(torch.uint8), dim=1)
        states, mask = accelerator.gather_for_metrics(states), accelerator.gather_for_metrics(mask)
        found += [row[kept.bool()].cpu() for row, kept in zip(states, mask, strict=True)]
    return found


def _predict(trainer, distinct: list[str], prompts: dict) -> dict[str, float]:
    accelerator, gathered = trainer.accelerator, []
    for states, mask in _hidden(trainer, [prompts[key] for key in distinct], "Value head: values"):
        # all heads' values: which one counts is known of the whole, not of this rank's part
        values = torch.stack([head(states, mask) for head in trainer.value_heads], dim=1)
        gathered.append(accelerator.gather_for_metrics(values).double().cpu())
    values = {}
    for key, row in zip(distinct, torch.cat(gathered), strict=True):
        fold = trainer.value_fold.get(key)
        values[key] = (row.mean() if fold is None else row[fold]).item()
    return values


def _hidden(trainer, prompts: list[list[int]], what: str):
    """Yield (B, T, hidden_size) states and the mask of their tokens, of this rank's batches."""
    rows = Dataset.from_dict({"input_ids": prompts, "labels": prompts})
    with frozen(trainer) as model:
        inner = trainer.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if is_peft_model(inner) else inner
        # the whole model is called, as ZeRO-3 fetches weights in the order of its forward; the head sees one position
        short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        kept = []
        hook = inner.base_model.register_forward_hook(lambda module, args, output: kept.append(output[0]))
        try:
            for batch in batches_of(trainer, rows, what, trainer.args.per_device_eval_batch_size):
                ids, mask = batch["input_ids"], batch["attention_mask"]
                model(input_ids=ids, attention_mask=mask, use_cache=False, **short)
                yield kept.pop(), mask.bool()
        finally:
            hook.remove()


def _rewards_of_generations(trainer, prompts: list[tuple]) -> list[float]:
    """Score the frozen model's own greedy answer to each (prompt, token ids)."""
    texts = _generate(trainer, [ids for _, ids in prompts])
    rows = []
    for (prompt, _), text in zip(prompts, texts, strict=True):
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        rows.append({**trainer.answers.reward_columns.get(baselines.prompt_key(prompt), {}), "prompt": prompt})
        rows[-1]["completion"] = completion
    rewards = trainer.answers.score(rows, "generations for the value head")
    scales.check_range(
        rewards, "generations for the value head", 0.0, trainer.args.reward_max,
        f"the value head's values lie between 0 and reward_max ({trainer.args.reward_max:g})",
        "Scale the reward function's scores, or set reward_max to their largest.",
    )  # fmt: skip
    return rewards


def _generate(trainer, prompts: list[list[int]]) -> list[str]:
    """Generate greedy answers; each rank writes its share."""
    accelerator, args, tokenizer = trainer.accelerator, trainer.args, trainer._tokenizer
    own = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    own.sort(key=lambda i: len(prompts[i]))
    kept = KeptTokens(
        tokenizer, get_rewards([trainer.answers.reward_func], config_field="reward_func"), [tokenizer.eos_token_id]
    )
    found: list[tuple[int, str]] = []
    with frozen(trainer) as model:
        inner = accelerator.unwrap_model(model)
        for start in range(0, len(own), args.per_device_eval_batch_size):
            batch = own[start : start + args.per_device_eval_batch_size]
            width = max(len(prompts[i]) for i in batch)
            gaps = [width - len(prompts[i]) for i in batch]
            ids = [[tokenizer.pad_token_id] * gap + prompts[i] for i, gap in zip(batch, gaps, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            output = inner.generate(
                input_ids=torch.tensor(ids, device=accelerator.device),
                attention_mask=torch.tensor(mask, device=accelerator.device),
                max_new_tokens=args.value_max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            found += zip(batch, map(kept.text, output[:, width:].tolist()), strict=True)
    return [text for _, text in sorted(gather_object(found))]


def check_heads_can_be_kept(args, reward_func) -> None:
    """Raise ConfigError where no folder can hold the heads, or `value_targets: generations` is impossible."""
    if args.value_head_dir is not None:
        checks.check_output_dir(args.value_head_dir, "value_head_dir")
    if args.value_targets != "generations":
        return
    if reward_func is None:
        raise ConfigError(
            "value_targets is generations, and no reward function is given to score them. Pass `reward_func` to the "
            "trainer, or set `value_targets: answers`."
        )
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigError(
            "value_targets is generations under ZeRO-3, which would gather every weight for every token. Find the "
            "values in a run without it, whose heads `value_head_dir` finds again, or set `value_targets: answers`."
        )


def _key(trainer, distinct: list[str], prompts: dict, targets: tuple) -> str:
    """Digest what the heads depend on: the frozen weights, the prompts with their rewards, the settings."""
    args = trainer.args
    names = (
        "reward_max",
        "value_folds",
        "value_epochs",
        "value_learning_rate",
        "value_prompts",
        "value_targets",
        "seed",
    )
    facts = [trainer.reference_key, [getattr(args, name) for name in names], trainer.accelerator.device.type]
    if args.value_targets == "generations":
        facts += [scoring.reward_key(trainer.answers.reward_func), args.value_max_new_tokens]
    digest = xxhash.xxh3_128(json.dumps(facts, default=str).encode())
    for key, mean, count in zip(distinct, *(values.tolist() for values in targets), strict=True):
        digest.update(json.dumps([key, prompts[key], mean, count]).encode())
    return digest.hexdigest()


def _log_quality(values: list[float], rewards: list[float], name: str) -> None:
    mean = baselines.mean(rewards)
    error = math.fsum((value - reward) ** 2 for value, reward in zip(values, rewards, strict=True)) / len(rewards)
    spread = math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    explained = 1 - error / spread if spread else 0.0
    get_logger().info(
        "%s: the value head's squared error is %.4g, the mean's %.4g (R^2 %.3f, on prompts it was not trained on)",
        name, error, spread, explained,
    )  # fmt: skip
    if name == "train_dataset" and explained < 0:
        get_logger().warning(
            "the value head predicts held-out rewards worse than their mean does (R^2 %.3f): `value: mean` is the "
            "better baseline here, unless more prompts or other value_epochs and value_learning_rate mend it.",
            explained,
        )


def save_heads(trainer, folder) -> None:
    """Write the heads into the folder of a saved adapter or model."""
    if trainer.value_heads is not None:
        value_head.save(trainer.value_heads, folder, trainer.value_head_key)
