from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trainer import backbone as backbone_module
from trainer.backbone import Backbone
from trainer.encoding import Answer, Batch, collate, pad

MakeBackbone = Callable[..., Backbone]


def left_padded(answers: list[Answer]) -> Batch:
    """The same answers with the padding in front, as a sampler lays them out."""
    longest = max(map(len, answers))
    rows = [a.query + a.response for a in answers]
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    attention = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    right = collate(answers)
    shift = torch.tensor([longest - len(row) for row in rows])
    return Batch(
        input_ids=ids,
        columns=torch.where(right.mask, right.columns + shift[:, None], 0),
        response=right.response,
        mask=right.mask,
        spans=right.spans + shift[:, None, None],
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
    )


def plain_logprobs(backbone: Backbone, answer: Answer, temperature: float) -> torch.Tensor:
    """One answer, no padding, all logits."""
    ids = torch.tensor([answer.query + answer.response])
    logprobs = functional.log_softmax(backbone.base(input_ids=ids).logits[0] / temperature, dim=-1)
    first = len(answer.query) - 1
    return torch.stack([logprobs[first + t, token] for t, token in enumerate(answer.response)])


@pytest.mark.parametrize("layout", [collate, left_padded])
def test_padding_on_either_side_changes_no_logprob(tiny_backbone: MakeBackbone, answers: list[Answer], layout) -> None:
    backbone = tiny_backbone("policy")
    with torch.no_grad(), backbone.adapters.on("policy"):
        logprobs = backbone.logprobs(layout(answers), temperature=0.7)
        for row, answer in zip(logprobs, answers, strict=True):
            alone = plain_logprobs(backbone, answer, 0.7)
            assert torch.allclose(row[: len(answer.response)], alone, atol=1e-10, rtol=0)
            assert torch.all(row[len(answer.response) :] == 0)


def test_logprobs_in_checkpointed_chunks_have_the_same_values_and_gradients(
    tiny_backbone: MakeBackbone, answers: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("policy")
    parameters = backbone.adapters.parameters("policy")
    results = []
    for elements in (2**26, 32 * 5):
        monkeypatch.setattr(backbone_module, "HEAD_ELEMENTS", elements)
        with backbone.adapters.on("policy"):
            logprobs = backbone.logprobs(collate(answers), temperature=1.0)
            results.append((logprobs, torch.autograd.grad(logprobs.sum(), parameters)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    for whole, chunked in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(whole, chunked, atol=1e-10)


def test_the_output_head_sees_response_positions_only(tiny_backbone: MakeBackbone, answers: list[Answer]) -> None:
    backbone = tiny_backbone("policy")
    seen: list[int] = []
    backbone.base.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        backbone.logprobs(collate(answers), temperature=1.0)
    assert seen == [sum(len(a.response) for a in answers)]


def test_with_adapters_off_the_backbone_is_the_base_bit_for_bit(answers: list[Answer]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = collate(answers).input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits
        backbone = Backbone(model, rank=8, alpha=16)
        backbone.adapters.add("policy")
        for parameter in backbone.adapters.parameters("policy"):
            parameter.normal_()
        assert torch.equal(backbone.base(input_ids=ids).logits, before)
        with backbone.adapters.on("policy"):
            assert not torch.allclose(backbone.base(input_ids=ids).logits, before, atol=0.1)
        assert torch.equal(backbone.base(input_ids=ids).logits, before)


def test_a_new_adapter_changes_nothing(tiny_backbone: MakeBackbone, answers: list[Answer]) -> None:
    backbone = tiny_backbone()
    backbone.adapters.add("policy")
    with torch.no_grad():
        reference = backbone.logprobs(collate(answers), temperature=1.0)
        with backbone.adapters.on("policy"):
            assert torch.equal(backbone.logprobs(collate(answers), temperature=1.0), reference)


def test_dropout_of_the_base_is_off_even_while_training(tiny_backbone: MakeBackbone, answers: list[Answer]) -> None:
    dropping = tiny_backbone("policy", attention_dropout=0.5)
    plain = tiny_backbone("policy", attention_dropout=0.0)
    for name in ("policy", None):
        with dropping.adapters.on(name), plain.adapters.on(name):
            a = dropping.logprobs(collate(answers), temperature=1.0)
            b = plain.logprobs(collate(answers), temperature=1.0)
        assert torch.equal(a, b)
    dropping.base.train()
    with dropping.adapters.on("policy"):
        assert not torch.equal(dropping.logprobs(collate(answers), temperature=1.0), b), "this test sees no dropout"


def test_gradients_of_an_adapter_are_those_of_the_formula_written_out(tiny_backbone: MakeBackbone) -> None:
    layer = next(iter(tiny_backbone("policy").adapters.layers.values()))
    layer.active = "policy"
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_a["policy"], layer.lora_b["policy"]
    written_out = x @ layer.base.weight.T + layer.scaling * (x @ a.T) @ b.T
    assert torch.allclose(layer(x), written_out, atol=1e-12)
    upstream = torch.randn_like(written_out)
    for got, expected in zip(
        torch.autograd.grad(layer(x), (x, a, b), upstream),
        torch.autograd.grad(written_out, (x, a, b), upstream),
        strict=True,
    ):
        assert torch.allclose(got, expected, atol=1e-10)


def test_only_the_adapter_that_is_on_gets_gradients(tiny_backbone: MakeBackbone, answers: list[Answer]) -> None:
    backbone = tiny_backbone("policy", "value")
    with backbone.adapters.on("value"):
        backbone.logprobs(collate(answers), temperature=1.0).sum().backward()
    assert all(p.grad is not None for p in backbone.adapters.parameters("value"))
    assert all(p.grad is None for p in backbone.adapters.parameters("policy"))
    assert all(p.grad is None for n, p in backbone.base.named_parameters() if "lora" not in n)


def test_an_unknown_adapter_is_named_in_the_error(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(KeyError, match="no adapter 'judge'"), tiny_backbone("policy").adapters.on("judge"):
        pass


def test_a_rank_that_vllm_cannot_serve_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="rank 12"):
        Backbone(tiny_backbone().base, rank=12)


def test_an_architecture_with_logits_of_its_own_is_refused() -> None:
    class Doubling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=0.2)  # fmt: skip
    with pytest.raises(ValueError, match="Doubling changes its logits"):
        Backbone(Doubling(config))


def test_peft_reads_a_published_adapter_and_gives_the_same_logprobs(
    tiny_backbone: MakeBackbone, answers: list[Answer], tmp_path: Path
) -> None:
    backbone = tiny_backbone("policy")
    tiny_backbone().base.save_pretrained(tmp_path / "base")
    backbone.publish("policy", tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    with torch.no_grad(), backbone.adapters.on("policy"):
        ours = backbone.logprobs(collate(answers), temperature=1.0)
    # A fresh copy of the base, since PEFT wraps the layers it is given.
    bare = LlamaForCausalLM(backbone.base.config).double()
    bare.load_state_dict(
        {k.replace(".base.", "."): v for k, v in backbone.base.state_dict().items() if "lora" not in k}
    )
    peft = PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
    logprobs = functional.log_softmax(peft(input_ids=pad([a.query + a.response for a in answers], 0)).logits, -1)
    batch = collate(answers)
    theirs = logprobs.gather(1, batch.columns[:, :, None].expand(-1, -1, 32)).gather(2, batch.response[:, :, None])
    assert torch.allclose(ours[batch.mask], theirs[:, :, 0][batch.mask], atol=1e-9)


def test_an_adapter_read_back_is_the_one_that_was_written(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    backbone = tiny_backbone("policy")
    backbone.publish("policy", tmp_path)
    backbone.adapters.load("incumbent", tmp_path)
    for ours, read in zip(
        backbone.adapters.parameters("policy"), backbone.adapters.parameters("incumbent"), strict=True
    ):
        assert torch.equal(ours, read)


def test_an_adapter_of_a_lower_rank_and_another_alpha_does_the_same_under_ours(
    tiny_backbone: MakeBackbone, answers: list[Answer], tmp_path: Path
) -> None:
    backbone = tiny_backbone("policy")
    backbone.publish("policy", tmp_path)
    torch.manual_seed(0)
    larger = Backbone(LlamaForCausalLM(backbone.base.config).double(), rank=16, alpha=64)
    larger.adapters.load("policy", tmp_path)
    batch = collate(answers)
    with torch.no_grad(), backbone.adapters.on("policy"), larger.adapters.on("policy"):
        expected = backbone.logprobs(batch, temperature=1.0)
        assert torch.allclose(larger.logprobs(batch, temperature=1.0), expected, atol=1e-10, rtol=0)
    for layer in larger.adapters.layers.values():
        assert (layer.lora_a["policy"].abs().sum(dim=1) > 0).all(), "ranks of zeros could never learn"


def test_an_adapter_of_a_higher_rank_is_refused(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    backbone = tiny_backbone("policy")
    backbone.publish("policy", tmp_path)
    other = Backbone(LlamaForCausalLM(backbone.base.config), rank=1)
    with pytest.raises(ValueError, match="another rank than 1"):
        other.adapters.load("policy", tmp_path)


def test_a_merged_adapter_is_the_same_model_and_leaves_no_trace(
    tiny_backbone: MakeBackbone, answers: list[Answer]
) -> None:
    backbone = tiny_backbone("policy", "value")
    batch = collate(answers)
    with torch.no_grad(), backbone.adapters.on("policy"):
        apart = backbone.logprobs(batch, temperature=1.0)
    with backbone.adapters.merged("policy"):
        assert torch.allclose(backbone.logprobs(batch, temperature=1.0), apart, atol=1e-10, rtol=0)
    with torch.no_grad(), backbone.adapters.on("value"):
        assert not torch.allclose(backbone.logprobs(batch, temperature=1.0), apart, atol=1e-4, rtol=0)
    with torch.no_grad(), backbone.adapters.on("policy"):
        assert torch.equal(backbone.logprobs(batch, temperature=1.0), apart)


def test_products_in_bfloat16_stay_close_to_float32(tiny_backbone: MakeBackbone, answers: list[Answer]) -> None:
    exact = tiny_backbone().base.float()
    model = LlamaForCausalLM(exact.config)
    model.load_state_dict({k.replace(".base.", "."): v for k, v in exact.state_dict().items()})
    backbone = Backbone(model, rank=8, matmul_dtype=torch.bfloat16)
    reference = Backbone(LlamaForCausalLM(exact.config), rank=8)
    reference.base.load_state_dict(exact.state_dict())
    with torch.no_grad():
        difference = backbone.logprobs(collate(answers), temperature=1.0) - reference.logprobs(
            collate(answers), temperature=1.0
        )
    assert 0 < difference.abs().max() < 0.1


def test_a_folder_loads_with_its_end_tokens(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_backbone().base.config).save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, rank=8, bf16=False)
    assert backbone.end_ids == {2}
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM)
