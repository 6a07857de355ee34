"""Supervised fine-tuning with noise on the embeddings of the forward that is trained: NEFTune, SymNoise and others."""

import contextlib
import math

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise.controller import EmbeddingNoise, innermost, input_embedding
from posttrain.mechanisms.noise.learned_head import LearnedHead
from posttrain.mechanisms.own_head import is_adapted
from posttrain.trainers.sft.hidden_noise import HiddenNoise
from posttrain.trainers.sft.mixin import InstructionMixin
from posttrain.trainers.sft.noisy_sft_config import NoisySFTConfig
from posttrain.trainers.sft.token_noise import TokenNoise, accepted_tokens

__all__ = ["NoisySFTConfig", "NoisySFTTrainer"]

_NEFTUNE = {
    "title": "NEFTune: Noisy Embeddings Improve Instruction Finetuning",
    "id": "2310.05914",
    "citation": """@inproceedings{jain2024neftune,
    title     = {{NEFTune: Noisy Embeddings Improve Instruction Finetuning}},
    author    = {Neel Jain and Ping-yeh Chiang and Yuxin Wen and John Kirchenbauer and Hong-Min Chu and
                 Gowthami Somepalli and Brian R. Bartoldson and Bhavya Kailkhura and Avi Schwarzschild and
                 Aniruddha Saha and Micah Goldblum and Jonas Geiping and Tom Goldstein},
    booktitle = {International Conference on Learning Representations},
    year      = 2024,
    eprint    = {arXiv:2310.05914},
}""",
}

_SYMNOISE = {
    "title": "SymNoise: Advancing Language Model Fine-tuning with Symmetric Noise",
    "id": "2312.01523",
    "citation": """@misc{yadav2023symnoise,
    title  = {{SymNoise: Advancing Language Model Fine-tuning with Symmetric Noise}},
    author = {Abhay Kumar Yadav and Arjun Singh},
    year   = 2023,
    eprint = {arXiv:2312.01523},
}""",
}

_NOISEFIT = {
    "title": "Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models",
    "id": "2504.03302",
    "citation": """@misc{khadangi2025noise,
    title  = {{Noise Augmented Fine Tuning for Mitigating Hallucinations in Large Language Models}},
    author = {Afshin Khadangi and Amir Sartipi and Igor Tchappi and Ramin Bahmani},
    year   = 2025,
    eprint = {arXiv:2504.03302},
}""",
}

_MSN = {
    "title": "Make Some Noise: Unlocking Language Model Parallel Inference Capability through Noisy Training",
    "id": "2406.17404",
    "citation": """@inproceedings{wang2024make,
    title     = {{Make Some Noise: Unlocking Language Model Parallel Inference Capability through Noisy Training}},
    author    = {Yixuan Wang and Xianzhen Luo and Fuxuan Wei and Yijun Liu and Qingfu Zhu and Xuanyu Zhang and
                 Qing Yang and Dongliang Xu and Wanxiang Che},
    booktitle = {Conference on Empirical Methods in Natural Language Processing},
    year      = 2024,
    eprint    = {arXiv:2406.17404},
}""",
}


class _Settles(TrainerCallback):
    """Compares the head of learned tokens to the model's own when training begins."""

    def __init__(self, trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self._trainer
        trainer._learned_head.settle(trainer.accelerator.unwrap_model(trainer.model))


class NoisySFTTrainer(InstructionMixin, SFTTrainer):
    """`trl.SFTTrainer` with noise on the embeddings of the forward that is trained: NEFTune, SymNoise and others.

    Takes what `trl.SFTTrainer` takes but for `formatting_func` and images, with a `NoisySFTConfig` as `args`. The noise
    of a token hangs on the run's seed, the optimiser step, the tokens of its sequence and its place there: batch split,
    ranks, padding, packing, recomputation and resumption change nothing of it. Evaluation, generation and every other
    forward are without noise. With `embedding_noise: none` or `noise_alpha: 0` the trainer is `trl.SFTTrainer`, except
    that on several ranks rows which fill up an epoch's last step do not count.

    Raises:
        ConfigError, DataError: (ValueErrors) bad settings; columns or values that are missing or cannot be; no row that
            `max_length` leaves something to learn of. All before the model loads.
        TypeError: `args` of another class.
    """

    _config_class = NoisySFTConfig
    _name = "SFT"
    _tag_names = ["trl", "posttrain", "noisy_sft", "sft"]
    _paper = None

    def _begin(self, ready) -> None:
        super()._begin(ready)
        self._noise, self._hidden, self._tokens, self._learned_head = None, None, None, None

    def _place(self, ready) -> None:
        super()._place(ready)
        args = self.args
        if args.adds_hidden_noise:
            self._hidden = HiddenNoise(self)
            self.add_callback(self._hidden)
            self._name, self._paper = "SFT with noisy hidden states (NoiseFiT)", _NOISEFIT
        if args.adds_token_noise:
            self._tokens = TokenNoise(self)
            self._name, self._paper = "SFT with noisy tokens (MSN)", _MSN
        if not args.adds_noise:
            return
        input_embedding(self.model)
        for adapter in getattr(self.model, "peft_config", {}).values():
            if adapter.is_prompt_learning:
                raise ConfigError(
                    f"the adapter is {adapter.peft_type.value}, whose virtual tokens are embedded before the model is "
                    "entered, past its noise. Use LoRA, or set `embedding_noise: none`."
                )
        self._noise = EmbeddingNoise(args.embedding_noise, args.noise_alpha, args.seed, args.length_mode == "tensor")
        self.copies = self._noise.copies
        if self._may_score_learned_tokens():
            self._learned_head = LearnedHead()
            self._learned_head.give(self.model)
            self.add_callback(_Settles(self))
        # what the card says was run
        self._name = f"SFT with noisy embeddings ({args.embedding_noise})"
        self._paper = _SYMNOISE if args.embedding_noise == "symnoise" else _NEFTUNE

    def method_state(self) -> dict:
        return super().method_state() | ({} if self._hidden is None else self._hidden.state())

    def load_method_state(self, state: dict) -> None:
        super().load_method_state(state)
        if self._hidden is not None:
            self._hidden.restore(state)

    def found_by_method(self) -> dict[str, object]:
        return super().found_by_method() | ({} if self._hidden is None else self._hidden.found())

    # stands on SFTTrainer.compute_loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._tokens is not None and self.model.training and torch.is_grad_enabled():
            inputs = self._tokens.added_to(inputs)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._hidden is not None and self._hidden.passes.squares is not None:
            if self.state.global_step == 0:
                self._hidden.check_ratio()
            self._hidden.add_metrics(self._means["train"])
        return found

    # stands on Trainer.training_step
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self._noise is not None and self.state.global_step == 0 and self.accelerator.sync_gradients:
            self._check_ratio()
        return loss

    def _check_ratio(self) -> None:
        """Raise ConfigError where the first step's noise is none, or greater than the embeddings, on all ranks."""
        nothing = torch.zeros(2, device=self.accelerator.device)
        squares = nothing if self._noise.squares is None else self._noise.squares
        noise, embeddings = self.accelerator.reduce(squares, "sum").tolist()
        ratio, alpha = math.sqrt(noise / max(embeddings, 1e-30)), self.args.noise_alpha
        if 0 < ratio <= 1:
            return
        size = (
            f"has {ratio:.3g} times the norm of the embeddings. Set it to {alpha / ratio:.2g} or less" if ratio else ""
        )
        raise ConfigError(
            f"noise_alpha is {alpha:g}, and the first step's noise "
            f"{size or 'has no size. Set it higher, or `embedding_noise: none`'}. Published strengths are 5 to 15, for "
            "models whose embeddings are larger than that noise."
        )

    def around_policy_forward(self):
        if self._hidden is not None:
            return self._hidden.passes.added_to(self.state.global_step, self.counted_tokens)
        if self._noise is None:
            return super().around_policy_forward()
        return self._noisy_forward()

    @contextlib.contextmanager
    def _noisy_forward(self):
        head = contextlib.nullcontext() if self._learned_head is None else self._learned_head.used()
        with head, self._noise.added_to(self.model, self.state.global_step, self.counted_tokens):
            yield

    def _may_score_learned_tokens(self) -> bool:
        """Return whether the loss is the plain one, of logits that the output embedding makes."""
        args = self.args
        plain = args.loss_type == "nll" and not args.label_smoothing_factor and self.compute_loss_func is None
        # by the width of the batch, the run is transformers' own to the bit; FSDP places the model in its own forward
        theirs = args.length_mode == "tensor" or self.is_fsdp_enabled
        return plain and not theirs and not self.aux_loss_enabled and not is_adapted(innermost(self.model))

    def finish_evaluation(self, dataloader, description: str) -> None:
        super().finish_evaluation(dataloader, description)
        if self.args.accepted_tokens_rows:
            self._metrics["eval"]["accepted_tokens"] = [accepted_tokens(self, dataloader.dataset)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._noise is not None and self.model.training and self._noise.squares is not None:
            self._means["train"].add_sum("noise/ratio", *self._noise.take_squares())
        super().log(logs, start_time)

    def finish_metrics(self, metrics: dict[str, float], mode: str) -> None:
        if "noise/ratio" in metrics:
            metrics["noise/ratio"] = math.sqrt(metrics["noise/ratio"])
