"""Every installed method passes the conformance kit as it comes, and the built-in ones in their other forms too."""

from __future__ import annotations

from peftkern import registry
from peftkern.testing import CHECKS, conformance_tests
from peftkern.testing.conformance import PytestCase

# Compiling takes most of the kit's time; the default configurations are enough for it.
QUICK = [name for name in CHECKS if name != "compiles_in_one_graph"]


def test_installed_method(peftkern_case: PytestCase) -> None:
    peftkern_case.run()


test_lora_everywhere = conformance_tests(
    "lora",
    {
        "target_modules": ".*(word_embeddings|wte|embed_tokens|query|c_attn|c_proj|q_proj|down_proj|0.output.dense)",
        "use_rslora": True,
        "bias": "lora_only",
        "rank_pattern": {"wte|q_proj|query": 3},
        "alpha_pattern": {"c_attn": 4},
        "init_lora_weights": "gaussian",
    },
    checks=QUICK,
)
test_lora_with_all_biases_and_head = conformance_tests(
    "lora",
    {"target_modules": "all-linear", "bias": "all", "task_type": "TOKEN_CLS", "layers_to_transform": [1]},
    checks=QUICK,
)
test_adapter_parallel = conformance_tests(
    "adapter", {"placement": "parallel", "layer_norm": True, "activation": "silu", "scale": 2.0}, checks=QUICK
)
test_adapter_houlsby = conformance_tests(
    "adapter", {"placement": "attention_and_ffn", "r": 5, "activation": "tanh"}, checks=QUICK
)
test_prompt_of_one_with_head = conformance_tests(
    "prompt_tuning",
    {"num_virtual_tokens": 1, "prompt_tuning_init": "SAMPLE_VOCAB", "task_type": "TOKEN_CLS"},
    checks=QUICK,
)
test_ia3_everywhere = conformance_tests(
    "ia3",
    {
        "target_modules": "all-linear",
        "feedforward_modules": ".*(output.dense|c_proj|down_proj|o_proj)",
        "task_type": "TOKEN_CLS",
    },
    checks=QUICK,
)
test_vera_everywhere = conformance_tests(
    "vera",
    {"target_modules": "all-linear", "r": 7, "vera_dropout": 0.1, "bias": "all", "save_projection": False},
    checks=QUICK,
)
test_vera_one_block = conformance_tests(
    "vera", {"target_modules": "all-linear", "r": 7, "layers_to_transform": 1, "bias": "vera_only"}, checks=QUICK
)
test_last_block = conformance_tests("head", {"last_k": 1}, checks=QUICK)


def test_builtin_methods_are_installed() -> None:
    assert {"lora", "adapter", "prompt_tuning", "head", "bitfit", "full", "ia3", "vera"} <= set(registry.names())
