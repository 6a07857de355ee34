"""Random models of a few hundred weights under the hub's names for TRL's test models, in a cache that needs no hub."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ORGANISATION = "trl-internal-testing"
REVISION = "0" * 40

# Where TRL ships no template of its own for a family
_CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') "
    "+ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_INST = (
    "{{ bos_token }}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{ ' ' + message['content'] + eos_token }}{%- else -%}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{%- endif -%}{%- endfor -%}"
)
_SPECIAL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|\[/?INST\]")
_SIZES = dict(
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=32,
    max_position_embeddings=4096,
)


@dataclass
class Model:
    """One of TRL's test models: what `AutoConfig.for_model` takes, and its tokenizer's special tokens."""

    kind: str
    template: str | None = None
    eos: str = "<|im_end|>"
    pad: str | None = "<|endoftext|>"
    bos: str | None = None
    settings: dict = field(default_factory=dict)
    classifies: bool = False
    remote: bool = False

    def chat_template(self) -> str | None:
        import trl

        if self.template in (None, _CHATML, _INST):
            return self.template
        return (Path(trl.__file__).parent / "chat_templates" / f"{self.template}.jinja").read_text()


_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8)
_LLAMA3 = dict(eos="<|eot_id|>", pad=None, bos="<|begin_of_text|>")
_GEMMA = dict(template="gemma", eos="<eos>", pad="<pad>", bos="<bos>", settings=dict(head_dim=2))
_COHERE = dict(eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", bos="<BOS_TOKEN>")
_MISTRAL = dict(template=_INST, eos="</s>", pad=None, bos="<s>")
_DEEPSEEK = dict(eos="<｜end▁of▁sentence｜>", pad=None, bos="<｜begin▁of▁sentence｜>")
_MLA = dict(num_attention_heads=2, num_key_value_heads=2)
_NEMOTRON = dict(
    hidden_size=16,
    layers_block_type=["mamba", "attention", "moe"],
    mamba_num_heads=8,
    mamba_head_dim=4,
    n_groups=1,
    ssm_state_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
)

MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": Model("qwen2", "qwen2_5"),
    "small-Qwen2ForCausalLM-2.5": Model("qwen2", "qwen2_5", settings=dict(hidden_size=128)),
    "tiny-Qwen2ForCausalLM-2.5-Coder": Model("qwen2", "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": Model("qwen2", "qwen2_5", classifies=True),
    "tiny-Qwen3ForCausalLM": Model("qwen3", "qwen3"),
    "small-Qwen3ForCausalLM": Model("qwen3", "qwen3", settings=dict(hidden_size=128)),
    "tiny-Qwen3ForCausalLM-Instruct-2507": Model("qwen3", "qwen3_instruct_2507"),
    "tiny-Qwen3ForSequenceClassification": Model("qwen3", "qwen3", classifies=True),
    "tiny-Qwen3MoeForCausalLM": Model("qwen3_moe", "qwen3", settings=_MOE),
    "tiny-LlamaForCausalLM-3": Model("llama", "llama3", **_LLAMA3),
    "tiny-LlamaForCausalLM-3.1": Model("llama", "llama3_1", **_LLAMA3),
    "tiny-LlamaForCausalLM-3.2": Model("llama", "llama3_2", **_LLAMA3),
    "tiny-LlamaForSequenceClassification-3.2": Model("llama", "llama3_2", classifies=True, **_LLAMA3),
    "tiny-RemoteForCausalLM": Model("llama", "llama3_2", remote=True, **_LLAMA3),
    "tiny-GemmaForCausalLM": Model("gemma", **_GEMMA),
    "tiny-Gemma2ForCausalLM": Model("gemma2", **_GEMMA),
    "tiny-CohereForCausalLM": Model("cohere", "cohere", **_COHERE),
    "tiny-Cohere2ForCausalLM": Model("cohere2", "cohere2", **_COHERE),
    "tiny-MistralForCausalLM-0.1": Model("mistral", **_MISTRAL),
    "tiny-MistralForCausalLM-0.2": Model("mistral", **_MISTRAL),
    "tiny-GptOssForCausalLM": Model(
        "gpt_oss", "gptoss", "<|return|>", settings=dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    ),
    "tiny-Glm4MoeForCausalLM": Model(
        "glm4_moe",
        "glm4moe",
        "<|endoftext|>",
        settings=dict(moe_intermediate_size=32, head_dim=2, n_routed_experts=4, num_experts_per_tok=2),
    ),
    "tiny-Lfm2ForCausalLM": Model(
        "lfm2",
        "lfm2",
        pad="<|pad|>",
        bos="<|startoftext|>",
        settings=dict(layer_types=["conv", "full_attention"], block_multiple_of=8, use_cache=False),
    ),
    "tiny-Lfm2ForCausalLM-2.5": Model(
        "lfm2",
        "lfm2_2_5",
        pad="<|pad|>",
        bos="<|startoftext|>",
        settings=dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, use_cache=False),
    ),
    "tiny-NemotronHForCausalLM-nano": Model("nemotron_h", "nemotron_3_nano", settings=_NEMOTRON),
    "tiny-Olmo3ForCausalLM": Model("olmo3", _CHATML, "<|endoftext|>", "<|pad|>"),
    "tiny-Phi3ForCausalLM": Model("phi3", "phi3", "<|endoftext|>"),
    "tiny-Phi3ForCausalLM-3": Model("phi3", "phi3", "<|endoftext|>"),
    "tiny-Phi3ForCausalLM-3.5": Model("phi3", "phi3_5", "<|endoftext|>"),
    "tiny-DeepseekV3ForCausalLM": Model("deepseek_v3", "deepseek_r1_distill", settings=_MLA, **_DEEPSEEK),
    "tiny-DeepseekV3ForCausalLM-0528": Model("deepseek_v3", "deepseekv3", settings=_MLA, **_DEEPSEEK),
    "tiny-GPTNeoXForCausalLM": Model("gpt_neox", None, "<|endoftext|>"),
}

_REMOTE_CONFIG = """from transformers import LlamaConfig


class RemoteConfig(LlamaConfig):
    model_type = "remote"
"""
_REMOTE_MODEL = """from transformers import LlamaForCausalLM, LlamaModel

from .configuration_remote import RemoteConfig


class RemoteModel(LlamaModel):
    config_class = RemoteConfig


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def write_hub(cache: Path, texts: list[str]) -> dict[str, str]:
    """Write every model into a cache of the hub's layout.

    Args:
        cache: the folder for HF_HUB_CACHE.
        texts: what the tokenizers' merges are learned from.

    Returns:
        why a model could not be built, by name.
    """
    failed = {}
    for name, model in MODELS.items():
        repository = cache / f"models--{ORGANISATION}--{name}"
        folder = repository / "snapshots" / REVISION
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        try:
            _write_model(folder, model, texts)
        except Exception as error:
            # a family that the installed transformers lacks, or reads another way
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return failed


def tokenizer_of(model: Model, texts: list[str]):
    """A byte-level tokenizer of a few hundred merges, with the family's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    template = model.chat_template()
    ends = [token for token in (model.bos, model.eos, model.pad) if token]
    special = list(dict.fromkeys([*ends, *_SPECIAL.findall(template or "")]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # twice, as a pair has to be seen twice to be merged
    tokenizer.train_from_iterator([*texts, *2 * [template or ""]], trainer)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    if model.bos:
        first = (model.bos, tokenizer.token_to_id(model.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{model.bos} $A", pair=f"{model.bos} $A $B", special_tokens=[first]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=model.bos,
        eos_token=model.eos,
        pad_token=model.pad,
        chat_template=template,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _write_model(folder: Path, model: Model, texts: list[str]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = tokenizer_of(model, texts)
    settings = _SIZES | model.settings
    config = AutoConfig.for_model(
        model.kind,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    if model.classifies:
        config.num_labels = 1
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if model.classifies else AutoModelForCausalLM
    network = kind.from_config(config).float()
    for module in network.modules():
        # large enough that a few steps move every weight
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    network.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.remote:
        _make_remote(folder)


def _make_remote(folder: Path) -> None:
    """The model as one whose code comes with it."""
    import json

    (folder / "configuration_remote.py").write_text(_REMOTE_CONFIG)
    (folder / "modeling_remote.py").write_text(_REMOTE_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModel": "modeling_remote.RemoteModel",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
