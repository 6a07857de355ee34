"""What the schemes of adapters share that are a plain LoRA on disk: config, side file, merging."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from posttrain.adapters import SIDE_FILE
from posttrain.errors import ConfigError
from posttrain.saved import read_json

# of LoraConfig, what makes another adapter of a layer than B A: its neutral value
VARIANTS = {
    "use_rslora": False, "use_dora": False, "lora_bias": False, "lora_dropout": 0.0, "target_parameters": None,
    "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None, "velora_config": None,
    "monteclora_config": None, "kasa_config": None, "megatron_config": None, "use_qalora": False,
}  # fmt: skip


@dataclass
class SchemeConfig(LoraConfig):
    """The config of an adapter of a scheme: PEFT's, whose own fields are saved in `posttrain_adapter.json` beside it.

    A scheme's config says what the table of schemes calls it (`called`), how errors and cards do (`title`) and which
    fields are its own (`own`); and what tells two settings of it apart (`scheme`), its `paper`, and what a card tells
    of it (`in_card`).
    """

    called: ClassVar[str]
    title: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"{self.what_r_is} is {self.r!r}; it must be 1 or more.")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        super().__post_init__()
        # PEFT writes names in the place of all-linear, and of a mixture's experts tensors and patterns beside them
        self._takes_what_fits = isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        self._patterns = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        # of each module that was left out of all-linear, by its path: its class, and whether a tensor of it was named
        self.left_out: dict[str, tuple[str, bool]] = {}

    @property
    def what_r_is(self) -> str:
        """What the rank is, in words, for an error."""
        return "the LoRA rank (r, lora_r)"

    @property
    def scheme(self) -> str:
        """The scheme in words, which a resumed run must share."""
        raise NotImplementedError

    @property
    def may_be_refactored(self) -> bool:
        """Whether the scheme is the same one in other factors of the same product, each step's gradients turned."""
        return False

    @property
    def paper(self) -> dict:
        """The paper, for a card."""
        raise NotImplementedError

    def in_card(self, trainer) -> list[tuple[str, object]]:
        """Return what a card tells of the adapter, by name."""
        raise NotImplementedError

    def attach(self, model, adapter: str) -> None:
        """Make those layers of a PeftModel the scheme's on which PEFT has put this adapter as a plain one."""

    def placed(self, model, adapter: str) -> list:
        """Return the layers of a PeftModel that have this adapter."""
        raise NotImplementedError

    def leave_out(self, path: str, module: nn.Module, is_parameter: bool) -> None:
        """Note a module of all-linear without this adapter. `is_parameter`: the path is that of a tensor in it."""
        if is_parameter:
            path = path.rpartition(".")[0]
            # what PEFT has made of all-linear for a mixture's experts
            self.target_parameters = None
            self.rank_pattern, self.alpha_pattern = (dict(pattern) for pattern in self._patterns)
        self.left_out[path] = type(module).__name__, is_parameter

    def what_was_left_out(self) -> str:
        """Return the modules that were left out of all-linear in words, by class; empty where none was."""
        counts = Counter(kind for kind, _ in self.left_out.values())
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        fused = any(is_parameter for _, is_parameter in self.left_out.values())
        return f"{told}, and linear layers that are named like the experts of a mixture" if fused else told

    def check_placed(self, model, adapter: str = "default") -> None:
        """Raise ConfigError where the adapter is on no layer of a PeftModel, as all of all-linear were left out."""
        if self.left_out and not self.placed(model, adapter):
            raise ConfigError(
                f"adapter {self.called}: all-linear has no plain linear layer in this model, which it could take "
                f"({self.what_was_left_out()}). Use LoRA for this model."
            )

    def to_dict(self) -> dict:
        """Return the config of the plain LoRA that is saved."""
        found = {name: value for name, value in super().to_dict().items() if name not in self.own}
        paths = sorted(path for path, (_, is_parameter) in self.left_out.items() if not is_parameter)
        before = found["exclude_modules"]
        if paths and isinstance(before, str):
            found["exclude_modules"] = "|".join([f"(?:{before})", *map(re.escape, paths)])
        elif paths:
            found["exclude_modules"] = sorted({*(before or ()), *paths})
        return found

    def beside(self) -> dict:
        """Return what the side file tells beside the scheme and its settings, by name."""
        return {}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the config of a plain LoRA, and `posttrain_adapter.json` beside it."""
        super().save_pretrained(save_directory, **kwargs)
        found = {"scheme": self.called} | {name: getattr(self, name) for name in self.own}
        # JSON has no infinity
        found |= {name: "inf" for name in self.own if found[name] == math.inf}
        (Path(save_directory) / SIDE_FILE).write_text(json.dumps(found | self.beside()), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """Read the config of a saved adapter; give it as `config=` to `PeftModel.from_pretrained` to train it on.

        Raises ConfigError where there is no such folder, or it has no file of this library beside the adapter.
        """
        found = cls.read_saved(folder)
        if found is None and not Path(folder).is_dir():
            raise ConfigError(f"{folder} is no folder here; give that of a saved adapter.")
        if found is None:
            raise ConfigError(f"{folder} has no {SIDE_FILE} of {cls.title}; use peft.LoraConfig for it.")
        return cls.of_plain(LoraConfig.from_pretrained(folder, **kwargs), **found["settings"])

    @classmethod
    def of_plain(cls, plain: LoraConfig, **own):
        """Return the config of this scheme with the settings of a plain LoRA's, and own ones beside them."""
        names = cls.__dataclass_fields__.keys() & LoraConfig.__dataclass_fields__.keys() - set(cls.own)
        return cls(**{n: getattr(plain, n) for n in names if cls.__dataclass_fields__[n].init}, **own)

    @classmethod
    def read_saved(cls, folder) -> dict | None:
        """Return {"settings": ...} of a saved adapter, and what else its side file tells; None where there is no file.

        Raises ConfigError for a file of another form, or of another scheme.
        """
        path = Path(folder) / SIDE_FILE
        if not path.is_file():
            return None
        found = read_json(path)
        if found.get("scheme") != cls.called or not cls.is_side_file(found):
            wanted = f"the scheme {cls.called}{cls.told_beside()}"
            raise ConfigError(f"{path} is none of {cls.title}: it must have {wanted}.")
        settings = {name: math.inf if found[name] == "inf" else found[name] for name in cls.own if name in found}
        return {"settings": settings} | {name: value for name, value in found.items() if name not in settings}

    @classmethod
    def is_side_file(cls, found: dict) -> bool:
        """Return whether a side file of this scheme has what it must beside settings."""
        return True

    @classmethod
    def told_beside(cls) -> str:
        """Return what that is in words, for an error."""
        return ""


class MergesAsLora(LoraVariant):
    """A layer's variant that is merged into its base, and taken out again, as a plain LoRA is."""

    def merge_safe(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def variants_of(model, kind: type[LoraVariant], adapter: str | None = None) -> list[tuple]:
    """Return path, layer, variant and adapter's name of each adapter of a kind on a model, in the model's order."""
    found = []
    for path, layer in model.named_modules():
        for name, variant in getattr(layer, "lora_variant", {}).items():
            if isinstance(variant, kind) and adapter in (None, name):
                found.append((path.removeprefix("base_model.model."), layer, variant, name))
    return found
