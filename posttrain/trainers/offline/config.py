"""Settings that every offline trainer has."""

from dataclasses import dataclass
from typing import ClassVar

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.run.config import CommonConfig


@dataclass(repr=False)
class OfflineConfig(CommonConfig):
    """Adds to `trl.SFTConfig` what `OfflineMixin` and `Answers` read; a method's config is (this class, SFTConfig).

    The properties are answers of a method that weighs answers by their rewards, and has no importance ratio.
    """

    prefix_sharing: str = setting(
        "auto",
        "Compute a prompt once for all of its answers in a batch, and no padding: auto, always or never.",
        identity=False,
        card=True,
    )
    check_reference: bool = setting(
        True,
        "Stop where the policy differs from its own starting weights before the first step.",
        identity=False,
        card=True,
    )
    ref_cache_dir: str | None = setting(
        None,
        "Folder of cached reference log-probabilities. Default: reference_logps in $POSTTRAIN_CACHE or "
        "~/.cache/posttrain.",
        identity=False,
        card=False,
    )

    always_in_card: ClassVar = ("max_length",)

    @property
    def weighs_by(self) -> str | None:
        """Return by what an answer is weighed: "rewards", "advantages" or None."""
        return "rewards"

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss reads the starting model's log-probabilities."""
        return False

    @property
    def drawn_by(self) -> str | None:
        """Return the setting by which rows are drawn by their weights, in words; None where they are drawn alike."""
        return None

    def _read_family(self):
        check_choice("prefix_sharing", self.prefix_sharing, ("auto", "always", "never"))

    def _unused(self):
        alone = (
            "an answer's importance ratio is of the whole sequence" if self.needs_reference else "a row has a weight"
        )
        alone, scored = f"{alone}, so rows cannot be joined", "the answer is what was scored"
        return {
            "loss_type": (("nll",), "its loss is the method's own"),
            "packing": ((False,), alone),
            "eval_packing": ((None, False), alone),
            "padding_free": ((False,), alone),
            "completion_only_loss": ((None, True), scored),
            "assistant_only_loss": ((False,), scored),
            "label_smoothing_factor": ((0, 0.0), "it would smooth the importance ratio"),
            "dataset_kwargs": ((None, {}), "rows are prepared here"),
        }
