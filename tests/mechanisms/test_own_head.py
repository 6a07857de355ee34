import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import add_fused_lm_head

from posttrain.mechanisms import own_head, prefix_sharing
from posttrain.models import tiny_model

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
# what stands between backbone and logits: dense, activation and norm; caps of other names; a scale
OWN = {
    "modernbert-decoder": {},
    "bert": dict(is_decoder=True),
    "roberta": dict(is_decoder=True),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=64),
    "xlstm": dict(num_heads=4, num_blocks=2),
}
# scales and caps that the fused head knows, and plain heads
FUSED = {
    "llama": {},
    "gemma2": {},
    "granite": dict(logits_scaling=4.0),
    "cohere": dict(logit_scale=0.3),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4),
}


def loud(architecture, **config):
    """A tiny model with logits as large as a trained one's, and a fused head."""
    config = dict(vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0) | config
    model = tiny_model(architecture, **config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.get_output_embeddings().weight.mul_(20)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


def inputs(seed=0, rows=3, length=14):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def expected(model, batch, temperature=1.0):
    """The fields, from the model's own logits, the long way."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    logits, labels = logits.double() / temperature, batch["labels"][:, 1:]
    kept = labels != -100
    logps = torch.log_softmax(logits, -1)
    found = {
        "log_probs": logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logps.exp() * logps).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == labels).double(),
    }
    return {name: (values * kept).float() for name, values in found.items()}


@pytest.mark.parametrize("architecture", OWN)
def test_a_model_with_more_before_its_logits_runs_its_own_head(architecture):
    model = loud(architecture, **OWN[architecture])
    head = own_head.Head(model)
    batch = inputs()
    fused = model(**batch, use_cache=False, fused_lm_head=True).log_probs
    own = expected(model, batch)
    assert (fused - own["log_probs"]).abs().max() > 0.1, "TRL's fused head is another one"
    reason = head.choose(model, 99, "cpu")
    assert "nats a token off on made-up tokens" in reason and head.mode == "tiles" and head.fields == FIELDS
    output = model(**batch, use_cache=False, fused_lm_head=True)
    for name in FIELDS:
        torch.testing.assert_close(getattr(output, name).float(), own[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(output.label_mask, batch["labels"][:, 1:] != -100)
    assert output.loss.item() == pytest.approx(-own["log_probs"].sum().item() / int(output.label_mask.sum()), rel=1e-5)


@pytest.mark.parametrize("architecture", FUSED)
def test_a_head_with_a_known_scale_or_cap_stays_fused(architecture):
    model = loud(architecture, **FUSED[architecture])
    head = own_head.Head(model)
    state = torch.get_rng_state()
    assert head.choose(model, 99, "cpu") is None and head.mode == "fused"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ["modernbert-decoder", "recurrent_gemma"])
@pytest.mark.parametrize("tile", [4, own_head.TILE])
def test_gradients_are_those_of_the_models_own_logits_in_any_tiles(architecture, tile, monkeypatch):
    monkeypatch.setattr(own_head, "TILE", tile)
    model, twin = loud(architecture, **OWN[architecture]), loud(architecture, **OWN[architecture])
    head = own_head.Head(twin)
    batch = inputs()
    assert head.choose(twin, 99, "cpu")
    output = twin(**batch, use_cache=False, fused_lm_head=True)
    (output.log_probs.sum() + output.entropy.sum()).backward()
    own = expected(model, batch)
    (own["log_probs"].sum() + own["entropy"].sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and {name for name, p in twin.named_parameters() if p.grad is not None} == set(gradients)
    for name, p in twin.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-3, rtol=1e-4)


def test_a_temperature_divides_the_logits():
    model = loud("modernbert-decoder")
    assert own_head.Head(model, temperature=0.7).choose(model, 99, "cpu")
    found = model(**inputs(), use_cache=False, fused_lm_head=True)
    for name, values in expected(model, inputs(), 0.7).items():
        torch.testing.assert_close(getattr(found, name).float(), values, atol=1e-5, rtol=1e-5)


def test_a_head_that_cannot_run_alone_runs_with_the_whole_model():
    model = loud("opt", word_embed_proj_dim=64, ffn_dim=128)
    with torch.no_grad():
        before = type(model).forward

    def doubled(self, *args, **kwargs):
        output = before(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    # OPT asks its decoder past the backbone
    twin = tiny_model("opt", word_embed_proj_dim=64, ffn_dim=128, vocab_size=99, bos_token_id=1, eos_token_id=2,
                      pad_token_id=0).eval()  # fmt: skip
    twin.load_state_dict(model.state_dict())
    twin.__class__ = type("Doubled", (type(twin),), {"forward": doubled})
    add_fused_lm_head(twin, outputs=FIELDS)
    head = own_head.Head(twin)
    assert head.choose(twin, 99, "cpu") and head.mode == "whole"
    found = twin(**inputs(), use_cache=False, fused_lm_head=True)
    for name, values in expected(twin, inputs()).items():
        torch.testing.assert_close(getattr(found, name).float(), values, atol=1e-4, rtol=1e-4)


def test_rows_without_a_label_give_zeros_with_a_gradient():
    model = loud("modernbert-decoder")
    own_head.Head(model).choose(model, 99, "cpu")
    batch = inputs()
    batch["labels"][:] = -100
    output = model(**batch, use_cache=False, fused_lm_head=True)
    assert not output.log_probs.any()
    output.log_probs.sum().backward()


def test_generation_is_as_it_was():
    model = loud("modernbert-decoder")
    ids = inputs()["input_ids"][1:2]
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    own_head.Head(model).choose(model, 99, "cpu")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)


def test_shared_prefixes_run_through_the_own_head():
    model = loud("modernbert-decoder")
    own_head.Head(model).choose(model, 99, "cpu")
    prefix_sharing.share_prefixes(model)
    *gaps, trouble = prefix_sharing.compare_padded_and_packed(model, model.config, "cpu")
    assert trouble is None and prefix_sharing.mismatch_reason(*gaps, half=False) is None


def test_the_auxiliary_loss_is_the_models_own():
    config = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    model = loud("mixtral", **config)
    batch = inputs()
    mask = batch["attention_mask"]
    own = model(batch["input_ids"], attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
    for mode in ("fused", "tiles", "whole"):
        twin = loud("mixtral", **config)
        head = own_head.Head(twin)
        head.mode = mode
        output = twin(**batch, use_cache=False, fused_lm_head=True, output_router_logits=True)
        torch.testing.assert_close(output.aux_loss, own, atol=1e-6, rtol=1e-6)
        assert twin(**batch, use_cache=False, fused_lm_head=True).aux_loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_in_half_precision(dtype):
    for architecture, config in FUSED.items():
        model = loud(architecture, **config).to(dtype)
        assert own_head.Head(model).choose(model, 99, "cpu") is None, architecture
    model = loud("modernbert-decoder").to(dtype)
    assert own_head.Head(model).choose(model, 99, "cpu")


def with_part(part):
    """A tiny Llama with `part` between its backbone and its output embedding, in the state that it starts in."""
    model = tiny_model("llama", vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 99, bias=False).requires_grad_(True)
    model.part = part
    model.config.tie_word_embeddings = False
    model.__class__ = type("WithPart", (type(model),), {"forward": with_part_forward})
    add_fused_lm_head(model, outputs=FIELDS)
    return model


def with_part_forward(self, input_ids=None, attention_mask=None, **kwargs):
    states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return CausalLMOutput(logits=self.lm_head(self.part(states)))


class Residual(torch.nn.Linear):
    def forward(self, states):
        return states + super().forward(states)


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, states):
        return states * self.weight


def zero_residual():
    part = Residual(64, 64)
    torch.nn.init.zeros_(part.weight)
    torch.nn.init.zeros_(part.bias)
    return part


@pytest.mark.parametrize("make", [zero_residual, Scale])
def test_a_part_of_the_head_that_starts_as_identity_is_seen(make):
    model = with_part(make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not own_head.compare(model, 99, "cpu").differs
    head = own_head.Head(model)
    assert head.choose(model, 99, "cpu") and head.mode != "fused"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.part.parameters():
            parameter.add_(0.3)
    found = model(**inputs(), use_cache=False, fused_lm_head=True)
    for name, values in expected(model, inputs()).items():
        torch.testing.assert_close(getattr(found, name).float(), values, atol=1e-4, rtol=1e-4)


def test_a_bias_of_the_output_embedding_that_starts_as_zero_is_in_the_fused_head():
    model = loud("phi")
    with torch.no_grad():
        model.lm_head.bias.zero_()
    head = own_head.Head(model)
    assert head.choose(model, 99, "cpu") is None and head.mode == "fused"
    assert not model.lm_head.bias.any()
