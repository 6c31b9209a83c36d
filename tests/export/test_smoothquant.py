"""SmoothQuant: what is folded where, read off the graph, and that the function stays the same."""

import weakref
from pathlib import Path

import pytest
import torch
from families import Family, random_folder, with_a_spike

from starling.export.check.sample_texts import TokenRows
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.dialects import DIALECTS
from starling.export.quantization.calibration import input_absmax
from starling.export.quantization.qdq_plan import kept_by_pattern, names_of, plan_activations, projection_groups
from starling.export.quantization.qdq_projections import InputPlan, QdqPlan
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.quantization.simulation import Simulation, mean_kl
from starling.export.quantization.smoothquant import InputGroup, SmoothedTensors, input_groups, smoothing_factors
from starling.export.tracing.tracer import trace

pytestmark = pytest.mark.slow

FAMILIES = [
    Family("llama", "llama"),
    Family("qwen2-bias", "qwen2", {"tie_word_embeddings": True}),
    Family("phi3-fused", "phi3", {"head_dim": 16}),
    Family("olmo2-norm-behind", "olmo2"),
    Family("cohere-parallel", "cohere"),
]


def groups_of(checkpoint: Checkpoint) -> list[InputGroup]:
    return input_groups(trace(checkpoint.config, DIALECTS["tensorrt"](), "fp32").model)


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = torch.randint(3, 32000, (4, 40), generator=torch.Generator().manual_seed(2))
    return TokenRows(ids, (40, 40, 25, 17))


def test_a_factor_is_the_papers_formula() -> None:
    x, w = torch.tensor([8.0, 0.5, 2.0]), torch.tensor([0.25, 1.0, 4.0])
    factors = smoothing_factors(x, w, 0.5)
    torch.testing.assert_close(factors / factors[0], (x / w).sqrt() / (x / w).sqrt()[0])
    assert (x / factors).max() == pytest.approx(1.0)


def test_a_channel_that_is_always_zero_stays_finite() -> None:
    factors = smoothing_factors(torch.tensor([100.0, 0.0]), torch.tensor([0.1, 0.0]), 0.8)
    assert torch.isfinite(factors).all()
    assert torch.isfinite((1 / factors).half()).all()


def test_llama_folds_into_norms_and_into_the_rows_of_up(tiny_checkpoint: Checkpoint) -> None:
    layer = "model.layers.0."
    attention, output, gate_up, down = groups_of(tiny_checkpoint)[:4]
    assert attention.tensors == tuple(f"{layer}self_attn.{side}_proj.weight" for side in "qkv")
    assert attention.makers == (f"{layer}input_layernorm.weight",)
    assert output.makers == ()  # attention stands between it and whatever could take it in
    assert gate_up.makers == (f"{layer}post_attention_layernorm.weight",)
    assert down.makers == (f"{layer}mlp.up_proj.weight",)


def test_a_tied_embedding_is_not_multiplied(demo_checkpoint: Checkpoint) -> None:
    head = groups_of(demo_checkpoint)[-1]
    assert head.tensors == ("model.embed_tokens.weight",)
    assert head.shared
    assert head.makers == ()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_smoothing_changes_nothing_in_float32(
    family: Family, rows: TokenRows, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The smoothed tensors and the explicit multipliers give the model's own probabilities."""
    checkpoint = open_checkpoint(str(random_folder(family, tiny_checkpoint, tmp_path / "model")))
    model = trace(checkpoint.config, DIALECTS["tensorrt"](), "fp32").model
    how = QdqQuantization("w8a8", smoothing=0.7, keep=())
    groups = projection_groups(model, how)
    absmax = input_absmax(checkpoint.config, checkpoint.tensors, rows)
    prepared = plan_activations(groups, how, kept_by_pattern(model, how), checkpoint.tensors, absmax)
    assert isinstance(prepared.tensors, SmoothedTensors)
    changed = [
        name
        for name in checkpoint.tensors.names()
        if not torch.equal(checkpoint.tensors.rows(name, 0, 8), prepared.tensors.rows(name, 0, 8))
    ]
    assert len(changed) >= 3 * 3  # every layer's projections, and norms where they can take it in

    def run(tensors: object, plan: object) -> torch.Tensor:
        simulation = Simulation(checkpoint.config, tensors, plan)  # type: ignore[arg-type]
        return simulation.log_probabilities(rows)

    plain = run(checkpoint.tensors, QdqPlan(how))
    assert (plain - run(prepared.tensors, prepared.plan)).abs().max() < 2e-4
    if any(plan.multiplier is not None for plan in prepared.plan.inputs.values()):
        assert (plain - run(prepared.tensors, QdqPlan(how))).abs().max() > 1e-2  # without the multipliers it would not


def test_smoothing_helps_where_a_channel_sticks_out(
    rows: TokenRows, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "model")))
    sharp = with_a_spike(checkpoint, layer=1)
    model = trace(checkpoint.config, DIALECTS["tensorrt"](), "fp32").model
    costs = {}
    for smoothing in (0.0, 0.5):
        how = QdqQuantization("w8a8", smoothing=smoothing, keep=())
        groups = projection_groups(model, how)
        absmax = input_absmax(checkpoint.config, sharp, rows)
        prepared = plan_activations(groups, how, kept_by_pattern(model, how), sharp, absmax)
        simulation = Simulation(checkpoint.config, prepared.tensors, prepared.plan)
        exact = simulation.log_probabilities(rows)
        simulation.activate(names_of(groups))
        costs[smoothing] = mean_kl(exact, simulation.log_probabilities(rows))
    assert 0 < costs[0.5] < costs[0.0] / 4


def test_a_closed_simulation_frees_its_model(tiny_checkpoint: Checkpoint) -> None:
    how = QdqQuantization("w8a8")
    plan = QdqPlan(how, inputs={"model.layers.0.mlp.up_proj.weight": InputPlan(0.1)})
    with Simulation(tiny_checkpoint.config, tiny_checkpoint.tensors, plan) as simulation:
        model = weakref.ref(simulation._model)
        assert model() is not None
    assert model() is None
